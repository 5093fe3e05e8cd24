// What the tiles share (tiles.c, tiles_256.c): steps of a panel, where the panels of activations lie, and reading ahead.
#pragma once

#include "tiles.h"

typedef enum { NIBBLES, BYTES, WORDS } code_kind;

// One of a panel's steps: 32 bits of each row times those of each column.
typedef struct {
    v128_t of[N_GROUPS];
} weight_step;

typedef struct {
    v128_t of[N_COLS];
} column_step;

ALWAYS_INLINE v128_t product_of(v128_t column, v128_t codes, code_kind kind) {
    return kind == WORDS ? wasm_i32x4_dot_i16x8(column, codes) : dot_codes(column, codes);
}

ALWAYS_INLINE v128_t sum_of(v128_t a, v128_t b, code_kind kind) {
    return kind == WORDS ? wasm_i32x4_add(a, b) : wasm_i16x8_add(a, b);
}

// The sums of n_steps steps, from `start` on if there is one. Each step is a loop that is never repeated (rows.h): Cranelift issues
// all loads of a basic block first, and sixteen registers hold no more than these six beside the sums.
ALWAYS_INLINE void add_steps(int n_steps, const weight_step * w, const column_step * y, const v128_t * start,
                             v128_t sums[N_COLS][N_GROUPS], int n_cols, code_kind kind) {
    for (int c = 0; c < n_cols; c++) {
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t product = product_of(y->of[c], w->of[g], kind);
            sums[c][g]           = start ? sum_of(start[c], product, kind) : product;
        }
    }
    OPAQUE(w);  // rows.h
    OPAQUE(y);
#pragma clang loop unroll(full)
    for (int i = 1; i < n_steps; i++) {
        do {
            for (int c = 0; c < n_cols; c++) {
                for (int g = 0; g < N_GROUPS; g++) {
                    sums[c][g] = sum_of(sums[c][g], product_of(y[i].of[c], w[i].of[g], kind), kind);
                }
            }
            OPAQUE(w);
            OPAQUE(y);
        } while (is_repeated(w));
    }
}

// The bytes of a panel: 8 steps of bytes, one vector more of each column for PANELS_BIASES, or 16 steps of words.
ALWAYS_INLINE size_t activation_panel_size(bool has_words, activation_kind kind) {
    return sizeof(activation_panel) + (has_words ? 16 : kind == PANELS_BIASES ? 9 : 8) * N_COLS * sizeof(v128_t);
}

ALWAYS_INLINE const activation_panel * next_panel(const activation_panel * y, int64_t n, bool has_words, activation_kind kind) {
    return (const activation_panel *) ((const char *) y + (size_t) n * activation_panel_size(has_words, kind));
}

// A load nobody waits for: wasm has no instruction to fetch what is read later.
ALWAYS_INLINE void fetch(read_ahead * ahead) {
    for (size_t i = 0; i < ahead->n_bytes && ahead->at + i < ahead->end; i += 64) {
        (void) *(const volatile uint8_t *) (ahead->at + i);
    }
    ahead->at += ahead->n_bytes;
}
