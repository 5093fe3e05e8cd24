// What the glue that samples shares.
#pragma once

#include "llama.h"

#include <cstdint>

struct pw_sampler_request {
    llama_sampler * chain;
    llama_sampler * grammar;  // may be null
    int32_t         idx;      // of the output in the last batch, as in llama_get_logits_ith
};

// Choose and accept the token after one output; LLAMA_TOKEN_NULL when the samplers leave none. Throws what they throw, and
// std::runtime_error for logits that are not numbers.
llama_token pw_sample(const pw_sampler_request & request, llama_context * context);
