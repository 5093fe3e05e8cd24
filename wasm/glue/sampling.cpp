// Choosing the next token in one call: a sampler chain and, beside it, a grammar, as common_sampler_sample combines them.
#include "sampling.h"
#include "glue.h"

#include <wasm_simd128.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <vector>

// Whether there is anything to choose from: a grammar may have refused every token. The samplers that draw assert it.
static bool has_choice(const llama_token_data_array & candidates) {
    for (size_t i = 0; i < candidates.size; i++) {
        if (candidates.data[i].logit > -INFINITY) {
            return true;
        }
    }
    return false;
}

// Functions that go over the vocabulary once: without safepoints, which would take most of their time.
#define ONE_PASS __attribute__((noinline, no_sanitize("coverage"))) static

// Whether every logit is a number or -inf. Without a branch in it, so that it becomes one SIMD comparison for four.
ONE_PASS bool are_numbers(const float * logits, int32_t n_vocab) {
    int32_t n_bad = 0;
    for (int32_t id = 0; id < n_vocab; id++) {
        n_bad += !(logits[id] <= FLT_MAX);  // NaN too
    }
    return n_bad == 0;
}

static const llama_sampler_i * interface_of(llama_sampler * sampler) {
    const llama_sampler_i * interface = sampler->iface;
    llama_sampler_free(sampler);
    return interface;
}

// Whether the chain does nothing but take the largest logit. Told by what samplers do, not by their names, which are free:
// top-k of 0 is what upstream makes of every sampler that its parameters turn off.
static bool is_greedy(llama_sampler * chain) {
    static const llama_sampler_i * const chains = interface_of(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    static const llama_sampler_i * const greedy = interface_of(llama_sampler_init_greedy());
    static const llama_sampler_i * const nothing = interface_of(llama_sampler_init_top_k(0));
    const int32_t n = chain->iface == chains ? llama_sampler_chain_n(chain) : 0;
    for (int32_t i = 0; i < n - 1; i++) {
        if (llama_sampler_chain_get(chain, i)->iface != nothing) {
            return false;
        }
    }
    return n > 0 && llama_sampler_chain_get(chain, n - 1)->iface == greedy;
}

// The first of the largest logits; -1 when all are -inf. No candidates are built: their list is three times as long.
ONE_PASS llama_token find_largest(const float * logits, int32_t n_vocab) {
    v128_t  largest = wasm_f32x4_splat(-INFINITY);
    int32_t id      = 0;
    for (; id + 4 <= n_vocab; id += 4) {
        largest = wasm_f32x4_pmax(largest, wasm_v128_load(logits + id));
    }
    float max = std::max(std::max(wasm_f32x4_extract_lane(largest, 0), wasm_f32x4_extract_lane(largest, 1)),
                         std::max(wasm_f32x4_extract_lane(largest, 2), wasm_f32x4_extract_lane(largest, 3)));
    for (; id < n_vocab; id++) {
        max = std::max(max, logits[id]);
    }
    if (max == -INFINITY) {
        return LLAMA_TOKEN_NULL;
    }
    for (id = 0; logits[id] != max; id++) {
    }
    return id;
}

ONE_PASS void fill_candidates(const float * logits, int32_t n_vocab, llama_token_data * candidates) {
    for (int32_t id = 0; id < n_vocab; id++) {
        candidates[id] = {id, logits[id], 0.0f};
    }
}

// Let the chain, behind `filter` where there is one, choose from all tokens; -1 when nothing is left.
static llama_token choose(llama_sampler * chain, llama_sampler * filter, const float * logits, int32_t n_vocab) {
    static std::vector<llama_token_data> candidates;  // only the engine's own thread samples
    if (!are_numbers(logits, n_vocab)) {
        throw std::runtime_error("the model's logits are not numbers");
    }
    if (!filter && is_greedy(chain)) {
        return find_largest(logits, n_vocab);
    }
    candidates.resize(n_vocab);
    fill_candidates(logits, n_vocab, candidates.data());
    llama_token_data_array array = {candidates.data(), candidates.size(), -1, false};
    if (filter) {
        llama_sampler_apply(filter, &array);
    }
    if (!has_choice(array)) {
        return LLAMA_TOKEN_NULL;
    }
    llama_sampler_apply(chain, &array);
    return array.selected >= 0 && (size_t) array.selected < array.size ? array.data[array.selected].id : LLAMA_TOKEN_NULL;
}

static bool allows(llama_sampler * grammar, llama_token token) {
    llama_token_data       single = {token, 1.0f, 0.0f};
    llama_token_data_array array  = {&single, 1, -1, false};
    llama_sampler_apply(grammar, &array);
    return single.logit != -INFINITY;
}

// The grammar is asked about the chosen token alone; only where it objects are all tokens filtered first.
llama_token pw_sample(const pw_sampler_request & request, llama_context * context) {
    const float * logits = llama_get_logits_ith(context, request.idx);  // aborts where there are none: the host checks first
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context)));
    llama_token   token   = choose(request.chain, nullptr, logits, n_vocab);
    if (request.grammar && token != LLAMA_TOKEN_NULL && !allows(request.grammar, token)) {
        token = choose(request.chain, request.grammar, logits, n_vocab);
    }
    if (token == LLAMA_TOKEN_NULL) {
        return token;
    }
    if (request.grammar) {
        llama_sampler_accept(request.grammar, token);
    }
    llama_sampler_accept(request.chain, token);
    return token;
}

// Choose and accept the token after output `idx`; -1 when the samplers leave none.
PW_EXPORT("pw_sampler_sample")
llama_token pw_sampler_sample(llama_sampler * chain, llama_sampler * grammar, llama_context * context, int32_t idx) {
    return pw_guard([&] { return pw_sample({chain, grammar, idx}, context); });
}

// The same for several sequences of one batch; writes one token each and answers how many were served.
PW_EXPORT("pw_sampler_sample_many")
int32_t pw_sampler_sample_many(int32_t n, const pw_sampler_request * requests, llama_context * context, llama_token * tokens) {
    return pw_guard([&] {
        for (int32_t i = 0; i < n; i++) {
            tokens[i] = pw_sample(requests[i], context);
        }
        return n;
    });
}
