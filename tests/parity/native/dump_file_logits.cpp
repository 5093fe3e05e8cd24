// Records the logits native llama.cpp computes for a few fixed tokens with each of some model files.
//
//   dump_file_logits FOLDER MODEL.gguf... > logits.json        {"MODEL.gguf": [[n_vocab floats] per token]}
//
// and writes each model, as llama.cpp saves it, to FOLDER.

#include "llama-cpp.h"
#include "llama.h"

#include "nlohmann/json.hpp"

#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

using json = nlohmann::ordered_json;

static constexpr int N_TOKENS = 8;

static json record(const std::string & path, const std::filesystem::path & folder) {
    llama_model_params model_params = llama_model_default_params();
    model_params.use_extra_bufts = false; // weights repacked for this processor cannot be saved: upstream crashes
    llama_model_ptr model(llama_model_load_from_file(path.c_str(), model_params));
    if (!model) {
        throw std::runtime_error("load " + path + ": llama_model_load_from_file failed");
    }
    llama_model_save_to_file(model.get(), (folder / std::filesystem::path(path).filename()).c_str());
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 64;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.type_k          = GGML_TYPE_F32;
    params.type_v          = GGML_TYPE_F32;
    llama_context_ptr ctx(llama_init_from_model(model.get(), params));
    if (!ctx) {
        throw std::runtime_error("load " + path + ": llama_init_from_model failed");
    }
    llama_batch batch = llama_batch_init(N_TOKENS, 0, 1);
    for (int i = 0; i < N_TOKENS; i++) {
        batch.token[i]     = 5 + 7 * i;
        batch.pos[i]       = i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
    }
    batch.n_tokens = N_TOKENS;
    const int status = llama_decode(ctx.get(), batch);
    llama_batch_free(batch);
    if (status != 0) {
        throw std::runtime_error("decode with " + path + ": llama_decode answered " + std::to_string(status));
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model.get()));
    json logits = json::array();
    for (int i = 0; i < N_TOKENS; i++) {
        const float * row = llama_get_logits_ith(ctx.get(), i);
        logits.push_back(std::vector<float>(row, row + n_vocab));
    }
    return logits;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s FOLDER MODEL.gguf...\n", argv[0]);
        return 2;
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    }, nullptr);
    try {
        json out = json::object();
        for (int i = 2; i < argc; i++) {
            out[std::filesystem::path(argv[i]).filename().string()] = record(argv[i], argv[1]);
        }
        printf("%s\n", out.dump().c_str());
    } catch (const std::exception & error) {
        fprintf(stderr, "dump_file_logits: %s\n", error.what());
        return 1;
    }
    return 0;
}
