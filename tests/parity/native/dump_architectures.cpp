// Records what native llama.cpp computes with a tiny random model of every architecture it can make one of: upstream's
// own metadata (tests/test-llama-archs.cpp, cut out by CMakeLists.txt), our weights, which numpy can make bit by bit.
//
//   dump_architectures FOLDER
//
// Writes FOLDER/NAME.gguf (metadata only) for each model, and FOLDER/logits.json:
// {"NAME": {"encode": bool, "embeddings": bool, "properties": {...}, "rows": [[floats] per token]}}; the rows are logits, or
// embeddings of models that compute nothing else. Upstream's test leaves out some architectures; what those lack is added.

#include "dump.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"
#include "llama-arch.h"
#include "llama-model-saver.h"

#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <fstream>

#include "upstream_architectures.inc"

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

static json embeddings_of(llama_context * ctx, int n) {
    const int n_embd = llama_model_n_embd_out(llama_get_model(ctx));
    json rows = json::array();
    for (int i = 0; i < n; i++) {
        const float * row = llama_get_embeddings_ith(ctx, i);
        rows.push_back(std::vector<float>(row, row + n_embd));
    }
    return rows;
}

static json record(gguf_context * metadata, bool encode, bool embeddings) {
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
    params.embeddings      = embeddings;
    params.pooling_type    = LLAMA_POOLING_TYPE_NONE;
    llama_context_ptr ctx(llama_init_from_model(model.get(), params));
    if (!ctx) {
        throw std::runtime_error("make the context: llama_init_from_model failed");
    }
    std::vector<llama_token> tokens;
    for (int i = 0; i < N_TOKENS; i++) {
        tokens.push_back((llama_token) (mix(i + 1) % 128));
    }
    decode(ctx.get(), tokens, 0, /*all_logits =*/ true, encode);
    return {
        { "encode", encode },
        { "embeddings", embeddings },
        { "properties", properties(model.get()) },
        { "rows", embeddings ? embeddings_of(ctx.get(), N_TOKENS) : logits_of(ctx.get(), N_TOKENS) },
    };
}

static bool needs_encode(llm_arch arch) { // as test_backends of test-llama-archs.cpp
    return arch == LLM_ARCH_T5 || arch == LLM_ARCH_DREAM || arch == LLM_ARCH_LLADA || arch == LLM_ARCH_LLADA_MOE ||
           arch == LLM_ARCH_RND1;
}

// What no model can be made of here: no implementation (clip, gptj), a head whose size is read off the file's tensors (clef),
// tensors whose absence means something (rwkv6qwen2), shapes that upstream has not worked out either (plm), or a draft that computes with another model's context.
static bool is_left_out(llm_arch arch) {
    return arch == LLM_ARCH_UNKNOWN || arch == LLM_ARCH_CLIP || arch == LLM_ARCH_GPTJ || arch == LLM_ARCH_CLEF || arch == LLM_ARCH_RWKV6QWEN2 ||
           arch == LLM_ARCH_PLM ||
           arch == LLM_ARCH_GEMMA4_ASSISTANT || arch == LLM_ARCH_EAGLE3 || arch == LLM_ARCH_DFLASH;
}

static bool gives_embeddings(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_BERT: case LLM_ARCH_MODERN_BERT: case LLM_ARCH_NOMIC_BERT: case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_NEO_BERT: case LLM_ARCH_JINA_BERT_V2: case LLM_ARCH_JINA_BERT_V3: case LLM_ARCH_EUROBERT:
        case LLM_ARCH_GEMMA_EMBEDDING: case LLM_ARCH_GEMMA_EMBEDDING2: case LLM_ARCH_T5ENCODER: case LLM_ARCH_LLAMA_EMBED:
        case LLM_ARCH_WAVTOKENIZER_DEC: return true;
        default: return false;
    }
}

// Adds what upstream's generator does not write for the architectures that its test leaves out.
static void complete(llm_arch arch, gguf_context * metadata) {
    const std::string name = llm_arch_name(arch);
    const auto set = [&](const char * key, uint32_t value) { gguf_set_val_u32(metadata, (name + "." + key).c_str(), value); };
    const auto set_list = [&](const char * key, const std::vector<int32_t> & values) {
        gguf_set_arr_data(metadata, (name + "." + key).c_str(), GGUF_TYPE_INT32, values.data(), values.size());
    };
    switch (arch) {
        case LLM_ARCH_BERT: case LLM_ARCH_NOMIC_BERT: case LLM_ARCH_NOMIC_BERT_MOE: case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
            gguf_set_val_u32(metadata, "tokenizer.ggml.token_type_count", 2);
            break;
        case LLM_ARCH_GEMMA_EMBEDDING2:
            set("embedding_length_per_layer_input", 64);
            break;
        case LLM_ARCH_GEMMA4:
            set_list("attention.sliding_window_pattern", { 1, 1, 1, 1, 0 });
            break;
        case LLM_ARCH_RWKV7: case LLM_ARCH_ARWKV7:
            for (const char * key : { "decay", "iclr", "value_residual_mix", "gate" }) {
                set((std::string("attention.") + key + "_lora_rank").c_str(), 32);
            }
            if (arch == LLM_ARCH_RWKV7) {
                break;
            }
            set("token_shift_count", 1);
            break;
        case LLM_ARCH_GRANITE_SWITCH:
            set("adapters.count", 2);
            set("adapters.lora_rank", 4);
            set_list("adapters.token_ids_activate", { (int32_t) (mix(7) % 128), (int32_t) (mix(15) % 128) });
            set_list("adapters.token_ids_substitute", { 6, 8 });
            break;
        default: break;
    }
}

static void run(const std::string & folder) {
    json out = json::object();
    for (const llm_arch & arch : llm_arch_all()) {
        if (is_left_out(arch)) {
            continue;
        }
        for (bool moe : { false, true }) {
            const bool only_moe = arch == LLM_ARCH_DEEPSEEK2OCR || arch == LLM_ARCH_NOMIC_BERT_MOE || moe_mandatory(arch);
            if (moe ? !only_moe && !moe_implemented(arch) : only_moe) {
                continue;
            }
            const std::string name = std::string(llm_arch_name(arch)) + (moe ? "-moe" : "");
            fprintf(stderr, "%s\n", name.c_str());
            gguf_context_ptr metadata = get_gguf_ctx(arch, moe);
            complete(arch, metadata.get());
            if (arch == LLM_ARCH_BAILINGMOE3) {
                gguf_remove_key(metadata.get(), "bailingmoe3.kda.safe_gate");
            }
            if (!gguf_write_to_file(metadata.get(), (folder + "/" + name + ".gguf").c_str(), /*only_meta =*/ true)) {
                throw std::runtime_error("write " + name + ".gguf failed");
            }
            out[name] = record(metadata.get(), needs_encode(arch), gives_embeddings(arch));
        }
    }
    std::ofstream(folder + "/logits.json") << out.dump();
}

int main(int argc, char ** argv) {
    return dump_main(argc, argv, 1, 1, "FOLDER", [](int, char ** args) { run(args[1]); });
}
