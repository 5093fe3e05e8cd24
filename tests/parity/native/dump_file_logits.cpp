// Records the logits native llama.cpp computes for a few fixed tokens with each of some model files.
//
//   dump_file_logits FOLDER MODEL.gguf... > logits.json        {"MODEL.gguf": [[n_vocab floats] per token]}
//
// and writes each model, as llama.cpp saves it, to FOLDER.

#include "dump.h"

#include <climits>
#include <filesystem>

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
    std::vector<llama_token> tokens;
    for (int i = 0; i < N_TOKENS; i++) {
        tokens.push_back(5 + 7 * i);
    }
    decode(ctx.get(), tokens, 0, /*all_logits =*/ true);
    return logits_of(ctx.get(), N_TOKENS);
}

static void run(int argc, char ** argv) {
    json out = json::object();
    for (int i = 2; i < argc; i++) {
        out[std::filesystem::path(argv[i]).filename().string()] = record(argv[i], argv[1]);
    }
    printf("%s\n", out.dump().c_str());
}

int main(int argc, char ** argv) {
    return dump_main(argc, argv, 1, INT_MAX, "FOLDER MODEL.gguf...", run);
}
