// One token further in one call: decode a token of each of several sequences, choose the next ones and spell them.
//
// A token of a small model takes a few milliseconds, in which the weights have driven everything else out of the caches. What
// the host does between two tokens is then many times as slow as it looks, so it does little: it makes one call, and reads
// one row for each sequence. A row is ready for the next call by itself: the chosen token, at the position that follows.
#include "glue.h"
#include "sampling.h"

#include <memory>
#include <vector>

static const int32_t PW_PIECE_BYTES = 48;

// Chosen tokens that are none. LLAMA_TOKEN_NULL is the third: the samplers left nothing.
static const llama_token PW_THREW     = -2;  // the samplers of this row threw
static const llama_token PW_NOT_ASKED = -3;  // those of a row before it did

// What pw_step_run answers besides llama_decode's own codes.
static const int32_t PW_DECODE_THREW = -1001;
static const int32_t PW_SAMPLE_THREW = -1002;

struct pw_step_row {
    llama_sampler * chain;
    llama_sampler * grammar;  // may be null
    llama_token     token;    // to be decoded
    llama_pos       pos;
    llama_seq_id    seq_id;
    llama_token     chosen;
    int32_t         is_eog;
    int32_t         n_piece;  // negative: the piece is longer than there is room for, as llama_token_to_piece says
    char            piece[PW_PIECE_BYTES];
};

static_assert(sizeof(pw_step_row) == 80, "the host reads rows of this size");

struct pw_step {
    llama_context *             context;
    const llama_vocab *         vocab;
    std::vector<pw_step_row>    rows;
    std::vector<llama_token>    tokens;
    std::vector<llama_pos>      pos;
    std::vector<int32_t>        n_seq_id;
    std::vector<llama_seq_id *> seq_id;
    std::vector<int8_t>         logits;
};

// Room for the rows of up to `n_max` sequences of a context.
PW_EXPORT("pw_step_new") pw_step * pw_step_new(llama_context * context, int32_t n_max) {
    return pw_guard([&] {
        auto step     = std::make_unique<pw_step>();
        step->context = context;
        step->vocab   = llama_model_get_vocab(llama_get_model(context));
        step->rows.resize(n_max);
        step->tokens.resize(n_max);
        step->pos.resize(n_max);
        step->n_seq_id.assign(n_max, 1);
        step->logits.assign(n_max, 1);
        for (pw_step_row & row : step->rows) {
            step->seq_id.push_back(&row.seq_id);
        }
        return step.release();
    });
}

PW_EXPORT("pw_step_free") void pw_step_free(pw_step * step) {
    delete step;
}

PW_EXPORT("pw_step_rows") pw_step_row * pw_step_rows(pw_step * step) {
    return step->rows.data();
}

static int32_t decode(pw_step * step, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        step->tokens[i] = step->rows[i].token;
        step->pos[i]    = step->rows[i].pos;
    }
    return llama_decode(step->context, {n, step->tokens.data(), nullptr, step->pos.data(), step->n_seq_id.data(),
                                        step->seq_id.data(), step->logits.data()});
}

static void choose_next(pw_step * step, int32_t i) {
    pw_step_row & row = step->rows[i];
    row.chosen        = PW_THREW;  // unless all of this succeeds
    const llama_token token = pw_sample({row.chain, row.grammar, i}, step->context);
    if (token != LLAMA_TOKEN_NULL) {
        row.is_eog  = llama_vocab_is_eog(step->vocab, token);
        row.n_piece = llama_token_to_piece(step->vocab, token, row.piece, PW_PIECE_BYTES, 0, false);
        row.token   = token;
        row.pos++;
    }
    row.chosen = token;
}

// Decode and sample the first `n` rows. Answers 0, llama_decode's code, after which no row has changed, or that something
// threw: what did is in pw_error, and where it was a sampler the rows before it have their tokens.
PW_EXPORT("pw_step_run") int32_t pw_step_run(pw_step * step, int32_t n) {
    int32_t code = PW_DECODE_THREW;
    pw_guard([&] {
        code = decode(step, n);
        if (code != 0) {
            return 0;
        }
        code = PW_SAMPLE_THREW;
        for (int32_t i = 0; i < n; i++) {
            step->rows[i].chosen = PW_NOT_ASKED;
        }
        for (int32_t i = 0; i < n; i++) {
            choose_next(step, i);
        }
        return code = 0;
    });
    return code;
}
