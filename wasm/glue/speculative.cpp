// Speculative decoding by common's implementations: n-grams of the text itself (prompt lookup), or a small model that reads
// along, propose tokens, and the caller verifies them with the target context.
#include "glue.h"

#include "common.h"
#include "speculative.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

struct pw_speculative {
    common_params_speculative params;
    common_speculative_ptr    impl;
    llama_tokens              prompt;
    llama_tokens              draft;
    common_batch              batch;
};

static bool is_ngram(common_speculative_type type) {
    return type >= COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE && type <= COMMON_SPECULATIVE_TYPE_NGRAM_CACHE;
}

// `size_n` tokens must repeat before the up to `size_m` that followed them are proposed.
PW_EXPORT("pw_speculative_new")
pw_speculative * pw_speculative_new(const char * type_name, llama_context * target, uint32_t n_seq_max, int32_t size_n, int32_t size_m) {
    return pw_guard([&] {
        const common_speculative_type type = common_speculative_type_from_name(type_name);
        if (!is_ngram(type)) {
            throw std::invalid_argument("not an n-gram kind of speculation: " + std::string(type_name));
        }
        auto speculative          = std::make_unique<pw_speculative>();
        auto & params             = speculative->params;
        params.types              = {type};
        params.draft.ctx_tgt      = target;
        for (auto * map : {&params.ngram_simple, &params.ngram_map_k, &params.ngram_map_k4v}) {
            map->size_n = (uint16_t) std::clamp(size_n, 1, 1024);
            map->size_m = (uint16_t) std::clamp(size_m, 1, 1024);
        }
        speculative->impl.reset(common_speculative_init(params, n_seq_max));
        if (!speculative->impl) {
            throw std::runtime_error("speculation of kind " + std::string(type_name) + " could not be started");
        }
        return speculative.release();
    });
}

// Whether a model can propose tokens for another: 1 or 0. Both must have a vocabulary of texts.
PW_EXPORT("pw_speculative_compatible") int32_t pw_speculative_compatible(const llama_model * target, const llama_model * draft) {
    return pw_guard([&] { return (int32_t) common_speculative_are_compatible(target, draft); });
}

// Of one sequence: up to `n_max` tokens that `draft`, the context of another model, finds likelier than `p_min`.
PW_EXPORT("pw_speculative_new_draft")
pw_speculative * pw_speculative_new_draft(llama_context * target, llama_context * draft, int32_t n_max, float p_min) {
    return pw_guard([&] {
        auto speculative     = std::make_unique<pw_speculative>();
        auto & params        = speculative->params;
        params.types         = {COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE};
        params.draft.ctx_tgt = target;
        params.draft.ctx_dft = draft;
        params.draft.n_max   = std::clamp(n_max, 1, 1024);
        params.draft.p_min   = p_min;
        speculative->batch   = common_batch(draft);
        speculative->impl.reset(common_speculative_init(params, 1));
        if (!speculative->impl) {
            throw std::runtime_error("speculation with a draft model could not be started");
        }
        return speculative.release();
    });
}

// Let the draft model read tokens of sequence 0, no more than its context takes at once; answers whether it could.
PW_EXPORT("pw_speculative_process")
int32_t pw_speculative_process(pw_speculative * speculative, const llama_token * tokens, int32_t n_tokens, llama_pos pos) {
    return pw_guard([&] {
        speculative->batch.clear();
        for (int32_t i = 0; i < n_tokens; i++) {
            speculative->batch.add(tokens[i], pos + i, 0, i == n_tokens - 1);
        }
        return (int32_t) common_speculative_process(speculative->impl.get(), speculative->batch);
    });
}

PW_EXPORT("pw_speculative_free") void pw_speculative_free(pw_speculative * speculative) {
    delete speculative;
}

// Once per generation, with the prompt's tokens.
PW_EXPORT("pw_speculative_begin")
int32_t pw_speculative_begin(pw_speculative * speculative, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens) {
    return pw_guard([&] {
        speculative->prompt.assign(tokens, tokens + n_tokens);
        common_speculative_begin(speculative->impl.get(), seq_id, speculative->prompt);
        return n_tokens;
    });
}

// Propose what may follow tokens[0..n_tokens) and then `last`; writes at most `capacity` ids and answers how many.
PW_EXPORT("pw_speculative_draft")
int32_t pw_speculative_draft(pw_speculative * speculative, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens,
                             llama_token last, llama_token * result, int32_t capacity) {
    return pw_guard([&] {
        speculative->prompt.assign(tokens, tokens + n_tokens);
        speculative->draft.clear();
        auto & params   = common_speculative_get_draft_params(speculative->impl.get(), seq_id);
        params.drafting = true;
        params.n_max    = capacity;
        params.pos0     = n_tokens;
        params.id_last  = last;
        params.prompt   = &speculative->prompt;
        params.result   = &speculative->draft;
        common_speculative_draft(speculative->impl.get());
        const int32_t n = std::min<int32_t>(capacity, (int32_t) speculative->draft.size());
        std::copy_n(speculative->draft.begin(), n, result);
        return n;
    });
}

// Tell how many of the proposed tokens the target accepted.
PW_EXPORT("pw_speculative_accept")
int32_t pw_speculative_accept(pw_speculative * speculative, llama_seq_id seq_id, int32_t n_accepted) {
    return pw_guard([&] {
        common_speculative_accept(speculative->impl.get(), seq_id, (uint16_t) n_accepted);
        return n_accepted;
    });
}
