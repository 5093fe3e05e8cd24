// Records what native llama.cpp computes for a list of prompts: the tokens it reads, the tokens it would write, and
// enough of its logits to judge another build of the same code by.
//
//   dump_logits MODEL PROMPTS.json N_THREADS step|batch > RECORD.json
//
// `step` feeds one token at a time after the prompt, as generation does; `batch` then feeds the same tokens as one
// batch. Their difference is native's own numerical noise.

#include "dump.h"

#include <algorithm>
#include <fstream>
#include <numeric>

static constexpr int N_TOP = 8;

struct settings {
    int n_ctx;
    int n_steps;
    int n_probes;
};

static llama_context_ptr make_context(llama_model * model, const settings & set, int n_threads) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = set.n_ctx;
    params.n_batch         = set.n_ctx;
    params.n_ubatch        = set.n_ctx;
    params.n_threads       = n_threads;
    params.n_threads_batch = n_threads;
    // Named, not left to defaults: the other side sets the same.
    params.type_k          = GGML_TYPE_F16;
    params.type_v          = GGML_TYPE_F16;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context_ptr ctx(llama_init_from_model(model, params));
    if (!ctx) {
        throw std::runtime_error("make context: llama_init_from_model failed");
    }
    return ctx;
}

static std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::string & text) {
    std::vector<llama_token> tokens(text.size() + 8);
    const int n = llama_tokenize(vocab, text.c_str(), (int) text.size(), tokens.data(), (int) tokens.size(),
                                 /*add_special =*/ true, /*parse_special =*/ true);
    if (n < 0) {
        throw std::runtime_error("tokenize: more tokens than bytes");
    }
    tokens.resize(n);
    return tokens;
}

// The largest logits with their tokens, then the logits of a fixed, evenly spread set of tokens.
static json summarize(const float * logits, int n_vocab, int n_probes) {
    std::vector<llama_token> ids(n_vocab);
    std::iota(ids.begin(), ids.end(), 0);
    std::partial_sort(ids.begin(), ids.begin() + N_TOP, ids.end(), [&](llama_token a, llama_token b) {
        return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    });
    std::vector<float> top;
    for (int i = 0; i < N_TOP; i++) {
        top.push_back(logits[ids[i]]);
    }
    std::vector<float> probes;
    for (int i = 0; i < n_probes; i++) {
        probes.push_back(logits[(long long) i * n_vocab / n_probes]);
    }
    return { { "ids", std::vector<llama_token>(ids.begin(), ids.begin() + N_TOP) }, { "top", top }, { "probes", probes } };
}

static json record_prompt(llama_model * model, const std::string & text, const settings & set, int n_threads, bool batched) {
    const llama_vocab * vocab   = llama_model_get_vocab(model);
    const int           n_vocab = llama_vocab_n_tokens(vocab);

    llama_context_ptr ctx = make_context(model, set, n_threads);
    const std::vector<llama_token> prompt = tokenize(vocab, text);
    if ((int) prompt.size() + set.n_steps > set.n_ctx) {
        throw std::runtime_error("record: prompt too long for the context: " + text);
    }
    decode(ctx.get(), prompt, 0, false);

    std::vector<llama_token> written;
    json steps = json::array();
    for (int i = 0; i < set.n_steps; i++) {
        const json step = summarize(llama_get_logits_ith(ctx.get(), -1), n_vocab, set.n_probes);
        written.push_back(step["ids"][0]);
        steps.push_back(step);
        decode(ctx.get(), { written.back() }, (int) prompt.size() + i, false);
    }
    if (batched) {
        std::vector<llama_token> tokens = prompt;
        tokens.insert(tokens.end(), written.begin(), written.end() - 1);
        llama_memory_clear(llama_get_memory(ctx.get()), true);
        decode(ctx.get(), tokens, 0, true);
        for (int i = 0; i < set.n_steps; i++) {
            steps[i] = summarize(llama_get_logits_ith(ctx.get(), (int) prompt.size() - 1 + i), n_vocab, set.n_probes);
        }
    }
    return { { "prompt", prompt }, { "written", written }, { "steps", steps } };
}

static void run(int, char ** argv) {
    const int  n_threads = std::stoi(argv[3]);
    const bool batched   = std::string(argv[4]) == "batch";

    std::ifstream file(argv[2]);
    const json spec = json::parse(file);
    const settings set = { spec.at("n_ctx"), spec.at("n_steps"), spec.at("n_probes") };

    llama_model_ptr model(llama_model_load_from_file(argv[1], llama_model_default_params()));
    if (!model) {
        throw std::runtime_error(std::string("load ") + argv[1] + ": llama_model_load_from_file failed");
    }
    json records = json::array();
    for (const json & prompt : spec.at("prompts")) {
        records.push_back(record_prompt(model.get(), prompt.at("text"), set, n_threads, batched));
    }
    const json out = {
        { "system_info", llama_print_system_info() },
        { "compiler", __VERSION__ },
        { "n_threads", n_threads },
        { "mode", argv[4] },
        { "n_vocab", llama_vocab_n_tokens(llama_model_get_vocab(model.get())) },
        { "records", records },
    };
    printf("%s\n", out.dump().c_str());
}

int main(int argc, char ** argv) {
    return dump_main(argc, argv, 4, 4, "MODEL PROMPTS.json N_THREADS step|batch", run);
}
