// What the strips' formats share (strips_32.c, strips_256.c, strips_q6_K.c).
#pragma once

#include "codes.h"
#include "strips.h"

#define WORD 4                                 // bytes of four codes of a row
#define N_WORDS (PANEL_WEIGHTS / WORD)
#define CELLS (N_GROUPS * (int) sizeof(v128_t))  // bytes of a word of every row

ALWAYS_INLINE void move_bytes(uint8_t * record, uint8_t * row, size_t n, bool is_weaving) {
    memcpy(is_weaving ? record : row, is_weaving ? row : record, n);
}

// n words of every row from `offset` on.
ALWAYS_INLINE void weave_words(uint8_t * record, uint8_t * const rows[STRIP_ROWS], size_t offset, int n, bool is_weaving) {
    for (int i = 0; i < n; i++) {
        for (int r = 0; r < STRIP_ROWS; r++, record += WORD) {
            move_bytes(record, rows[r] + offset + WORD * (size_t) i, WORD, is_weaving);
        }
    }
}

// A half of every row.
ALWAYS_INLINE void weave_halves(uint8_t * record, uint8_t * const rows[STRIP_ROWS], size_t offset, bool is_weaving) {
    for (int r = 0; r < STRIP_ROWS; r++) {
        move_bytes(record + 2 * r, rows[r] + offset, 2, is_weaving);
    }
}

// Eight halves as f32.
ALWAYS_INLINE void load_halves(const uint8_t * x, v128_t out[N_GROUPS]) {
    f16x8_load(x, &out[0], &out[1]);
}
