// What the makers of weight panels share.
#pragma once

#include "tiles.h"

// Four rows of four 32-bit lanes, turned: out[i] holds lane i of every row.
ALWAYS_INLINE void turn(const v128_t rows[N_ROWS], v128_t out[4]) {
    const v128_t ab_low  = wasm_i32x4_shuffle(rows[0], rows[1], 0, 4, 1, 5), ab_high = wasm_i32x4_shuffle(rows[0], rows[1], 2, 6, 3, 7);
    const v128_t cd_low  = wasm_i32x4_shuffle(rows[2], rows[3], 0, 4, 1, 5), cd_high = wasm_i32x4_shuffle(rows[2], rows[3], 2, 6, 3, 7);
    out[0] = wasm_i64x2_shuffle(ab_low, cd_low, 0, 2);
    out[1] = wasm_i64x2_shuffle(ab_low, cd_low, 1, 3);
    out[2] = wasm_i64x2_shuffle(ab_high, cd_high, 0, 2);
    out[3] = wasm_i64x2_shuffle(ab_high, cd_high, 1, 3);
}

ALWAYS_INLINE void interleave(const v128_t rows[N_ROWS], v128_t codes[4][N_GROUPS], int group) {
    v128_t turned[4];
    turn(rows, turned);
    for (int i = 0; i < 4; i++) {
        codes[i][group] = turned[i];
    }
}

// Sixteen bytes of each row, the low halves of which are codes of one place and the high halves of another.
ALWAYS_INLINE void interleave_nibbles(const v128_t rows[N_ROWS], v128_t low[4][N_GROUPS], v128_t high[4][N_GROUPS], int group) {
    v128_t turned[4];
    turn(rows, turned);
    for (int i = 0; i < 4; i++) {
        low[i][group]  = low_nibbles(turned[i]);
        high[i][group] = high_nibbles(turned[i]);
    }
}

// Eight 16-bit lanes of four rows, turned and widened: out[i] holds lane i of every row as f32.
ALWAYS_INLINE void lanes_to_f32(const v128_t rows[N_ROWS], v128_t out[8]) {
    const v128_t ab_low  = wasm_i16x8_shuffle(rows[0], rows[1], 0, 8, 1, 9, 2, 10, 3, 11);
    const v128_t cd_low  = wasm_i16x8_shuffle(rows[2], rows[3], 0, 8, 1, 9, 2, 10, 3, 11);
    const v128_t ab_high = wasm_i16x8_shuffle(rows[0], rows[1], 4, 12, 5, 13, 6, 14, 7, 15);
    const v128_t cd_high = wasm_i16x8_shuffle(rows[2], rows[3], 4, 12, 5, 13, 6, 14, 7, 15);
    const v128_t pairs[4] = {
        wasm_i32x4_shuffle(ab_low, cd_low, 0, 4, 1, 5), wasm_i32x4_shuffle(ab_low, cd_low, 2, 6, 3, 7),
        wasm_i32x4_shuffle(ab_high, cd_high, 0, 4, 1, 5), wasm_i32x4_shuffle(ab_high, cd_high, 2, 6, 3, 7),
    };
    for (int i = 0; i < 4; i++) {
        out[2 * i]     = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_low_i16x8(pairs[i]));
        out[2 * i + 1] = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_high_i16x8(pairs[i]));
    }
}

// A format of which `pack` unpacks a block of each row of a group, to n_panels.
#define TILE_FORMAT(format, block, n_panels, pack, tile_set, bias_of_codes)                                                \
    static void pack##_blocks(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {                           \
        for (int group = 0; group < N_GROUPS; group++, x += N_ROWS) {                                                      \
            const uint8_t * rows[N_ROWS] = {x[0], x[1], x[2], x[3]};                                                       \
            for (int64_t i = 0; i < n; i++) {                                                                              \
                pack(rows, panels + n_panels * i, group);                                                                  \
                for (int r = 0; r < N_ROWS; r++) {                                                                         \
                    rows[r] += sizeof(block);                                                                              \
                    OPAQUE(rows[r]);                                                                                       \
                }                                                                                                          \
            }                                                                                                              \
            for (int r = 0; r < N_ROWS; r++) {                                                                             \
                x[r] = rows[r];                                                                                            \
            }                                                                                                              \
        }                                                                                                                  \
    }                                                                                                                      \
    const tile_format format = {pack##_blocks, &tile_set, bias_of_codes, false};
