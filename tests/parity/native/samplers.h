// Samplers by name and arguments, as the programs that record sampling read them.
#pragma once

#include "dump.h"

#include <limits>

static const llama_vocab * vocab;

static llama_sampler * make_dry(const json & a) {
    std::vector<std::string>  texts = a.at("sequence_breakers");
    std::vector<const char *> pointers;
    for (const auto & text : texts) {
        pointers.push_back(text.c_str());
    }
    return llama_sampler_init_dry(
        vocab, a.at("multiplier"), a.at("base"), a.at("allowed_length"), a.at("last_n"), pointers.data(), pointers.size());
}

static llama_sampler * make_logit_bias(const json & a) {
    std::vector<llama_logit_bias> biases;
    for (const auto & item : a.at("biases")) {
        // null is minus infinity, which JSON cannot say
        biases.push_back({item[0], item[1].is_null() ? -std::numeric_limits<float>::infinity() : item[1].get<float>()});
    }
    return llama_sampler_init_logit_bias(llama_vocab_n_tokens(vocab), biases.size(), biases.data());
}

static llama_sampler * make_lazy(const json & a) {
    std::vector<std::string>  texts;
    std::vector<llama_token>  tokens;
    std::vector<const char *> pointers;
    for (const auto & trigger : a.at("triggers")) {
        if (trigger.is_string()) {
            texts.push_back(trigger);
        } else {
            tokens.push_back(trigger);
        }
    }
    for (const auto & text : texts) {
        pointers.push_back(text.c_str());
    }
    const std::string grammar = a.at("grammar");
    return llama_sampler_init_grammar_lazy_patterns(
        vocab, grammar.c_str(), "root", pointers.data(), pointers.size(), tokens.data(), tokens.size());
}

static llama_sampler * make(const std::string & name, const json & a) {
    const int32_t n_vocab = llama_vocab_n_tokens(vocab);
    if (name == "greedy")      { return llama_sampler_init_greedy(); }
    if (name == "dist")        { return llama_sampler_init_dist(a.at("seed")); }
    if (name == "top_k")       { return llama_sampler_init_top_k(a.at("k")); }
    if (name == "top_p")       { return llama_sampler_init_top_p(a.at("p"), a.at("min_keep")); }
    if (name == "min_p")       { return llama_sampler_init_min_p(a.at("p"), a.at("min_keep")); }
    if (name == "typical")     { return llama_sampler_init_typical(a.at("p"), a.at("min_keep")); }
    if (name == "temp")        { return llama_sampler_init_temp(a.at("t")); }
    if (name == "temp_ext")    { return llama_sampler_init_temp_ext(a.at("t"), a.at("delta"), a.at("exponent")); }
    if (name == "xtc")         { return llama_sampler_init_xtc(a.at("p"), a.at("t"), a.at("min_keep"), a.at("seed")); }
    if (name == "top_n_sigma") { return llama_sampler_init_top_n_sigma(a.at("n")); }
    if (name == "mirostat")    { return llama_sampler_init_mirostat(n_vocab, a.at("seed"), a.at("tau"), a.at("eta"), a.at("m")); }
    if (name == "mirostat_v2") { return llama_sampler_init_mirostat_v2(a.at("seed"), a.at("tau"), a.at("eta")); }
    if (name == "adaptive_p")  { return llama_sampler_init_adaptive_p(a.at("target"), a.at("decay"), a.at("seed")); }
    if (name == "penalties")   { return llama_sampler_init_penalties(n_vocab, a.at("last_n"), a.at("repeat"), a.at("frequency"), a.at("presence")); }
    if (name == "infill")      { return llama_sampler_init_infill(vocab); }
    if (name == "dry")         { return make_dry(a); }
    if (name == "logit_bias")  { return make_logit_bias(a); }
    if (name == "grammar")     { return llama_sampler_init_grammar(vocab, a.at("grammar").get<std::string>().c_str(), "root"); }
    if (name == "grammar_lazy_patterns") { return make_lazy(a); }
    throw std::runtime_error("unknown sampler " + name);
}

static llama_sampler * make_chain(const json & samplers) {
    llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    for (const auto & sampler : samplers) {
        llama_sampler * made = make(sampler[0], sampler[1]);
        if (!made) {
            throw std::runtime_error("could not create " + sampler[0].get<std::string>());
        }
        llama_sampler_chain_add(chain, made);
    }
    return chain;
}
