// Records what native llama.cpp computes with a tiny random model of every architecture it can make one of: upstream's
// own metadata (tests/test-llama-archs.cpp, cut out by CMakeLists.txt), our weights, which numpy can make bit by bit.
//
//   dump_architectures FOLDER
//
// Writes FOLDER/NAME.gguf (metadata only) for each model, and FOLDER/logits.json:
// {"NAME": {"encode": bool, "n_vocab": int, "properties": {...}, "logits": [[n_vocab floats] per token]}}.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"
#include "llama-cpp.h"
#include "llama.h"

#include "llama-arch.h"
#include "llama-model-saver.h"

#include "nlohmann/json.hpp"

#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "upstream_architectures.inc"

using json = nlohmann::ordered_json;

static constexpr int N_TOKENS = 24;

// The arithmetic of tests/parity/architectures.py: equal on both sides to the last bit.
static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

static uint64_t hash_name(const char * name) {
    uint64_t hash = 0xCBF29CE484222325ull;
    for (; *name; name++) {
        hash = (hash ^ (uint8_t) *name) * 0x100000001B3ull;
    }
    return hash;
}

static float weight(uint64_t seed, uint64_t i) {
    const int64_t bits = (int64_t) (mix(seed + (i + 1) * 0x9E3779B97F4A7C15ull) >> 40) - (1 << 23);
    return (float) bits * (0.1732f / (1 << 23)); // uniform, standard deviation 0.1
}

static void set_tensor_data(ggml_tensor * tensor, void *) {
    const uint64_t seed     = hash_name(tensor->name);
    const bool     negative = strstr(tensor->name, "ssm_a") != nullptr; // Mamba's decay
    const int64_t  n        = ggml_nelements(tensor);
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; i++) {
        const float value = weight(seed, i);
        values[i] = negative ? -std::fabs(value) : value;
    }
    if (tensor->type == GGML_TYPE_F16) {
        std::vector<ggml_fp16_t> halves(n);
        ggml_fp32_to_fp16_row(values.data(), halves.data(), n);
        ggml_backend_tensor_set(tensor, halves.data(), 0, ggml_nbytes(tensor));
    } else if (tensor->type == GGML_TYPE_F32) {
        ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
    } else {
        throw std::runtime_error(std::string("fill ") + tensor->name + ": it is neither f32 nor f16");
    }
}

static json properties(const llama_model * model) {
    return {
        { "n_ctx_train", llama_model_n_ctx_train(model) },
        { "n_embd", llama_model_n_embd(model) },
        { "n_embd_inp", llama_model_n_embd_inp(model) },
        { "n_embd_out", llama_model_n_embd_out(model) },
        { "n_layer", llama_model_n_layer(model) },
        { "n_layer_nextn", llama_model_n_layer_nextn(model) },
        { "n_head", llama_model_n_head(model) },
        { "n_head_kv", llama_model_n_head_kv(model) },
        { "n_swa", llama_model_n_swa(model) },
        { "n_cls_out", llama_model_n_cls_out(model) },
        { "rope_type", llama_model_rope_type(model) },
        { "rope_freq_scale_train", llama_model_rope_freq_scale_train(model) },
        { "decoder_start_token", llama_model_decoder_start_token(model) },
        { "has_encoder", llama_model_has_encoder(model) },
        { "has_decoder", llama_model_has_decoder(model) },
        { "is_recurrent", llama_model_is_recurrent(model) },
        { "is_hybrid", llama_model_is_hybrid(model) },
        { "is_diffusion", llama_model_is_diffusion(model) },
    };
}

static json record(gguf_context * metadata, bool encode) {
    llama_model_params model_params = llama_model_default_params();
    model_params.progress_callback = [](float, void *) { return true; };
    llama_model_ptr model(llama_model_init_from_user(metadata, set_tensor_data, nullptr, model_params));
    if (!model) {
        throw std::runtime_error("make the model: llama_model_init_from_user failed");
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 64;
    params.n_batch         = 32;
    params.n_ubatch        = 32;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.type_k          = GGML_TYPE_F16;
    params.type_v          = GGML_TYPE_F16;
    llama_context_ptr ctx(llama_init_from_model(model.get(), params));
    if (!ctx) {
        throw std::runtime_error("make the context: llama_init_from_model failed");
    }
    llama_batch batch = llama_batch_init(N_TOKENS, 0, 1);
    for (int i = 0; i < N_TOKENS; i++) {
        batch.token[i]     = (llama_token) (mix(i + 1) % 128);
        batch.pos[i]       = i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
    }
    batch.n_tokens = N_TOKENS;
    const int status = (encode ? llama_encode(ctx.get(), batch) : 0) || llama_decode(ctx.get(), batch);
    llama_batch_free(batch);
    if (status != 0) {
        throw std::runtime_error("llama_encode or llama_decode failed");
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model.get()));
    json logits = json::array();
    for (int i = 0; i < N_TOKENS; i++) {
        const float * row = llama_get_logits_ith(ctx.get(), i);
        logits.push_back(std::vector<float>(row, row + n_vocab));
    }
    return {
        { "encode", encode },
        { "n_vocab", n_vocab },
        { "properties", properties(model.get()) },
        { "logits", logits },
    };
}

static bool needs_encode(llm_arch arch) { // as test_backends of test-llama-archs.cpp
    return arch == LLM_ARCH_T5 || arch == LLM_ARCH_DREAM || arch == LLM_ARCH_LLADA || arch == LLM_ARCH_LLADA_MOE ||
           arch == LLM_ARCH_RND1;
}

static bool is_left_out(llm_arch arch) { // as test_backends of test-llama-archs.cpp
    return arch == LLM_ARCH_UNKNOWN || arch == LLM_ARCH_GEMMA4 || arch == LLM_ARCH_GEMMA4_ASSISTANT ||
           arch == LLM_ARCH_EAGLE3 || arch == LLM_ARCH_DFLASH || !arch_supported(arch);
}

static void run(const std::string & folder) {
    json out = json::object();
    for (const llm_arch & arch : llm_arch_all()) {
        if (is_left_out(arch)) {
            continue;
        }
        for (bool moe : { false, true }) {
            if (moe ? !moe_implemented(arch) : moe_mandatory(arch)) {
                continue;
            }
            const std::string name = std::string(llm_arch_name(arch)) + (moe ? "-moe" : "");
            fprintf(stderr, "%s\n", name.c_str());
            gguf_context_ptr metadata = get_gguf_ctx(arch, moe);
            if (arch == LLM_ARCH_BAILINGMOE3) {
                gguf_remove_key(metadata.get(), "bailingmoe3.kda.safe_gate");
            }
            if (!gguf_write_to_file(metadata.get(), (folder + "/" + name + ".gguf").c_str(), /*only_meta =*/ true)) {
                throw std::runtime_error("write " + name + ".gguf failed");
            }
            out[name] = record(metadata.get(), needs_encode(arch));
        }
    }
    std::ofstream(folder + "/logits.json") << out.dump();
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
        return 2;
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    }, nullptr);
    try {
        run(argv[1]);
    } catch (const std::exception & error) {
        fprintf(stderr, "dump_architectures: %s\n", error.what());
        return 1;
    }
    return 0;
}
