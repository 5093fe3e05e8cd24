// Records what native llama.cpp's backend sampling leaves: samplers that a context computes in its own graph.
//
//   dump_backend_sampling MODEL.gguf < cases.json > dumped.json
//
// A case is {"params": {"n_seq_max": 2, "n_outputs_max_per_seq": 1, ...}, "samplers": {"0": [["top_k", {"k": 5}], ...]},
// "steps": [...]}. Steps: ["set", sequence, [[name, arguments], ...] or null], ["decode", [[token, position, sequence,
// output], ...]], and those that put something out: ["read", i] gives {"token", "candidates", "logits", "probs"} of an
// output, null where there are none; ["sample", sequence, i] gives the token llama_sampler_sample takes.

#include "samplers.h"

#include <iostream>
#include <map>

struct runner {
    llama_context_ptr ctx;
    std::map<int, llama_sampler *> chains;
    json results = json::array();

    void decode_rows(const json & rows) {
        llama_batch batch = llama_batch_init((int) rows.size(), 0, 1);
        batch.n_tokens = (int) rows.size();
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.token[i]     = rows[i][0];
            batch.pos[i]       = rows[i][1];
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = rows[i][2];
            batch.logits[i]    = rows[i][3].get<bool>();
        }
        const int status = llama_decode(ctx.get(), batch);
        llama_batch_free(batch);
        if (status != 0) {
            throw std::runtime_error("llama_decode answered " + std::to_string(status));
        }
    }

    template <typename T> static json values(const T * data, uint32_t n) {
        return data && n ? json(std::vector<T>(data, data + n)) : json();
    }

    json read(int i) {
        llama_context * c = ctx.get();
        return {
            { "token", llama_get_sampled_token_ith(c, i) },
            { "candidates", values(llama_get_sampled_candidates_ith(c, i), llama_get_sampled_candidates_count_ith(c, i)) },
            { "logits", values(llama_get_sampled_logits_ith(c, i), llama_get_sampled_logits_count_ith(c, i)) },
            { "probs", values(llama_get_sampled_probs_ith(c, i), llama_get_sampled_probs_count_ith(c, i)) },
        };
    }

    void run(const json & step) {
        const std::string operation = step.at(0);
        if (operation == "decode") {
            decode_rows(step.at(1));
        } else if (operation == "read") {
            results.push_back(read(step.at(1)));
        } else if (operation == "sample") {
            results.push_back(llama_sampler_sample(chains.at(step.at(1)), ctx.get(), step.at(2)));
        } else if (operation == "set") {
            chains[step.at(1)] = step.at(2).is_null() ? nullptr : make_chain(step.at(2)); // the old one stays: it is not long
            if (!llama_set_sampler(ctx.get(), step.at(1), chains[step.at(1)])) {
                throw std::runtime_error("llama_set_sampler refused");
            }
        } else {
            throw std::runtime_error("unknown step " + operation);
        }
    }
};

static json record(llama_model * model, const json & given) {
    runner runner;
    std::vector<llama_sampler_seq_config> configs;
    for (const auto & [seq_id, samplers] : given.at("samplers").items()) {
        configs.push_back({ std::stoi(seq_id), runner.chains[std::stoi(seq_id)] = make_chain(samplers) });
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx     = 512;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k    = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED; // whose native graph rounds to 16 bits
    params.samplers        = configs.data();
    params.n_samplers      = configs.size();
    for (const auto & [key, value] : given.at("params").items()) {
        if (key == "n_seq_max") { params.n_seq_max = value; }
        else if (key == "n_ubatch") { params.n_ubatch = value; }
        else if (key == "n_outputs_max_per_seq") { params.n_outputs_max_per_seq = value; }
        else { throw std::runtime_error("unknown parameter " + key); }
    }
    runner.ctx.reset(llama_init_from_model(model, params));
    if (!runner.ctx) {
        throw std::runtime_error("llama_init_from_model failed");
    }
    for (const json & step : given.at("steps")) {
        runner.run(step);
    }
    return runner.results;
}

static void run(int, char ** argv) {
    llama_model_ptr model(llama_model_load_from_file(argv[1], llama_model_default_params()));
    if (!model) {
        throw std::runtime_error(std::string("cannot load ") + argv[1]);
    }
    vocab = llama_model_get_vocab(model.get());
    json dumped = json::array();
    for (const json & given : json::parse(std::cin)) {
        dumped.push_back(record(model.get(), given));
    }
    printf("%s\n", dumped.dump().c_str());
}

int main(int argc, char ** argv) {
    return dump_main(argc, argv, 1, 1, "MODEL.gguf < cases.json", run);
}
