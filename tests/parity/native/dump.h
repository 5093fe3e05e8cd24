// The frame of the dump programs: arguments, a quiet log, one line that says what went wrong, and feeding tokens.
#pragma once

#include "llama-cpp.h"
#include "llama.h"

#include "nlohmann/json.hpp"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

using json = nlohmann::ordered_json;

// Runs `run(argc, argv)` with llama.cpp's log reduced to errors; without `is_loud`, to nothing. `usage` says what comes
// behind the program's name; the arguments must be `n_least` to `n_most`.
template <typename F>
static int dump_main(int argc, char ** argv, int n_least, int n_most, const char * usage, F run, bool is_loud = true) {
    const char * slash = strrchr(argv[0], '/');
    const char * name  = slash ? slash + 1 : argv[0];
    if (argc - 1 < n_least || argc - 1 > n_most) {
        fprintf(stderr, "usage: %s %s\n", name, usage);
        return 2;
    }
    llama_log_set([](ggml_log_level level, const char * text, void * loud) {
        if (loud && level == GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    }, is_loud ? argv : nullptr);
    llama_backend_init();
    try {
        run(argc, argv);
    } catch (const std::exception & error) {
        fprintf(stderr, "%s: %s\n", name, error.what());
        return 1;
    }
    llama_backend_free();
    return 0;
}

// Feeds `tokens` of sequence 0 at positions first_pos, first_pos + 1, ...; logits for all of them or for the last one.
[[maybe_unused]]
static void decode(llama_context * ctx, const std::vector<llama_token> & tokens, int first_pos, bool all_logits, bool encode = false) {
    const int n = (int) tokens.size();
    llama_batch batch = llama_batch_init(n, 0, 1);
    for (int i = 0; i < n; i++) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = first_pos + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = all_logits || i == n - 1;
    }
    batch.n_tokens = n;
    int status = encode ? llama_encode(ctx, batch) : 0;
    status     = status ? status : llama_decode(ctx, batch);
    llama_batch_free(batch);
    if (status != 0) {
        throw std::runtime_error("decode: llama.cpp answered " + std::to_string(status));
    }
}

// The logits of the first `n` tokens of the last batch, which must have been asked for.
[[maybe_unused]]
static json logits_of(llama_context * ctx, int n) {
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    json rows = json::array();
    for (int i = 0; i < n; i++) {
        const float * row = llama_get_logits_ith(ctx, i);
        rows.push_back(std::vector<float>(row, row + n_vocab));
    }
    return rows;
}
