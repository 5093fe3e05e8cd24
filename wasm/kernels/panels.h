// What the makers of weight panels share.
#pragma once

#include "tiles.h"

// Four rows of four 32-bit lanes, turned: out[i] holds lane i of every row.
ALWAYS_INLINE void interleave(const v128_t rows[N_ROWS], v128_t out[4]) {
    const v128_t ab_low  = wasm_i32x4_shuffle(rows[0], rows[1], 0, 4, 1, 5), ab_high = wasm_i32x4_shuffle(rows[0], rows[1], 2, 6, 3, 7);
    const v128_t cd_low  = wasm_i32x4_shuffle(rows[2], rows[3], 0, 4, 1, 5), cd_high = wasm_i32x4_shuffle(rows[2], rows[3], 2, 6, 3, 7);
    out[0] = wasm_i64x2_shuffle(ab_low, cd_low, 0, 2);
    out[1] = wasm_i64x2_shuffle(ab_low, cd_low, 1, 3);
    out[2] = wasm_i64x2_shuffle(ab_high, cd_high, 0, 2);
    out[3] = wasm_i64x2_shuffle(ab_high, cd_high, 1, 3);
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

// A format whose blocks `pack` unpacks one at a time, to n_panels each.
#define TILE_FORMAT(format, block, n_panels, pack, tile_set, bias_of_codes)                                                \
    static const uint8_t * pack##_blocks(int64_t n, const uint8_t * x[N_ROWS], const uint8_t * next, weight_panel * panels) { \
        for (int64_t i = 0; i < n; i++, panels += n_panels) {                                                              \
            pack(x, panels);                                                                                               \
            next = touch(next, N_ROWS * sizeof(block));                                                                    \
            for (int r = 0; r < N_ROWS; r++) {                                                                             \
                x[r] += sizeof(block);                                                                                     \
            }                                                                                                              \
        }                                                                                                                  \
        return next;                                                                                                       \
    }                                                                                                                      \
    const tile_format format = {pack##_blocks, &tile_set, bias_of_codes};
