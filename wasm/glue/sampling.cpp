// Choosing the next token in one call: a sampler chain and, beside it, a grammar, as common_sampler_sample combines them.
#include "glue.h"

#include "llama.h"

#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <vector>

struct pw_sampler_request {
    llama_sampler * chain;
    llama_sampler * grammar;  // may be null
    int32_t         idx;      // of the output in the last batch, as in llama_get_logits_ith
};

// Whether there is anything to choose from: a grammar may have refused every token. The samplers that draw assert it.
static bool has_choice(const llama_token_data_array & candidates) {
    for (size_t i = 0; i < candidates.size; i++) {
        if (candidates.data[i].logit > -INFINITY) {
            return true;
        }
    }
    return false;
}

// Let the chain, behind `filter` where there is one, choose from all tokens; -1 when nothing is left.
static llama_token choose(llama_sampler * chain, llama_sampler * filter, const float * logits, int32_t n_vocab) {
    static std::vector<llama_token_data> candidates;  // only the engine's own thread samples
    candidates.resize(n_vocab);
    for (int32_t id = 0; id < n_vocab; id++) {
        if (!(logits[id] <= FLT_MAX)) {  // NaN too
            throw std::runtime_error("the model's logits are not numbers");
        }
        candidates[id] = {id, logits[id], 0.0f};
    }
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
static llama_token sample(const pw_sampler_request & request, llama_context * context) {
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
    return pw_guard([&] { return sample({chain, grammar, idx}, context); });
}

// The same for several sequences of one batch; writes one token each and answers how many were served.
PW_EXPORT("pw_sampler_sample_many")
int32_t pw_sampler_sample_many(int32_t n, const pw_sampler_request * requests, llama_context * context, llama_token * tokens) {
    return pw_guard([&] {
        for (int32_t i = 0; i < n; i++) {
            tokens[i] = sample(requests[i], context);
        }
        return n;
    });
}
