// Applies samplers to given logits, step by step, and prints what they leave: the record for tests/parity/test_sampling.py.
//
//   dump_sampling MODEL.gguf < cases.json > dumped.json
//
// A case is {"samplers": [["top_k", {"k": 5}], …], "steps": [{"logits": [..]}, {"accept": 7}, {"reset": true},
// {"clone": true}, …]}; "accept": -1 accepts the token selected last. Each step with logits gives
// {"ids": [..], "logits": [..], "p": [..], "selected": index}.
#include "samplers.h"

#include <iostream>
#include <iterator>

static json apply(llama_sampler * chain, const json & logits, llama_token & selected) {
    std::vector<llama_token_data> data;
    for (const auto & logit : logits) {
        data.push_back({(llama_token) data.size(), logit.get<float>(), 0.0f});
    }
    llama_token_data_array array = {data.data(), data.size(), -1, false};
    llama_sampler_apply(chain, &array);
    json ids = json::array(), left = json::array(), p = json::array();
    for (size_t i = 0; i < array.size; i++) {
        ids.push_back(array.data[i].id);
        left.push_back(array.data[i].logit); // infinities print as null
        p.push_back(array.data[i].p);
    }
    selected = array.selected >= 0 ? array.data[array.selected].id : -1;
    return {{"ids", ids}, {"logits", left}, {"p", p}, {"selected", array.selected}};
}

static json run(const json & given) {
    llama_sampler * chain = make_chain(given.at("samplers"));
    json        results  = json::array();
    llama_token selected = -1;
    for (const auto & step : given.at("steps")) {
        if (step.contains("logits")) {
            results.push_back(apply(chain, step.at("logits"), selected));
        } else if (step.contains("accept")) {
            const llama_token token = step.at("accept");
            llama_sampler_accept(chain, token < 0 ? selected : token);
        } else if (step.contains("reset")) {
            llama_sampler_reset(chain);
        } else if (step.contains("clone")) {
            llama_sampler * copy = llama_sampler_clone(chain);
            llama_sampler_free(chain);
            chain = copy;
        }
    }
    llama_sampler_free(chain);
    return results;
}

static void record(int, char ** argv) {
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model_ptr model(llama_model_load_from_file(argv[1], params));
    if (!model) {
        throw std::runtime_error(std::string("cannot load ") + argv[1]);
    }
    vocab = llama_model_get_vocab(model.get());
    const json cases = json::parse(std::string(std::istreambuf_iterator<char>(std::cin), {}));
    json       dumped = json::array();
    for (const auto & given : cases) {
        dumped.push_back(run(given));
    }
    std::cout << dumped.dump() << std::endl;
}

int main(int argc, char ** argv) {
    return dump_main(argc, argv, 1, 1, "MODEL.gguf < cases.json", record);
}
