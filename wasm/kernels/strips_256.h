// What is known of strips of blocks of 256 weights (strips_256.c) where their panels are made (strips_256_panels.c), too.
#pragma once

#include "panels.h"
#include "weave.h"

#define N_WORDS 8      // of 32 bytes
#define N_64 4         // parts of 64 weights
#define SCALES 16      // bytes for a pair of groups
#define HEAD_K 32      // d and dmin
#define FIFTH_CELLS (N_WORDS * CELLS)

// Each 16-bit lane of a pair in both places.
#define FIRST_OF_PAIRS(v) wasm_i16x8_shuffle(v, v, 0, 0, 2, 2, 4, 4, 6, 6)
#define SECOND_OF_PAIRS(v) wasm_i16x8_shuffle(v, v, 1, 1, 3, 3, 5, 5, 7, 7)

// The fifth bit of group 2 j, or 2 j + 1, as a 16.
#define FIFTH(bits, place)                                                                                                 \
    wasm_v128_and((place) < 4 ? wasm_i16x8_shl(bits, (place) < 4 ? 4 - (place) : 0)                                        \
                              : wasm_u16x8_shr(bits, (place) < 4 ? 0 : (place) - 4),                                       \
                  wasm_i8x16_splat(16))

// Four codes of 6 bits out of a quarter's three cells.
ALWAYS_INLINE void codes_q6_K(v128_t a, v128_t b, v128_t bits, v128_t codes[4]) {
    const v128_t two_bits = wasm_i8x16_splat(0x30);
    codes[0] = wasm_v128_or(low_nibbles(a), wasm_v128_and(wasm_i16x8_shl(bits, 4), two_bits));
    codes[1] = wasm_v128_or(low_nibbles(b), wasm_v128_and(wasm_i16x8_shl(bits, 2), two_bits));
    codes[2] = wasm_v128_or(high_nibbles(a), wasm_v128_and(bits, two_bits));
    codes[3] = wasm_v128_or(high_nibbles(b), wasm_v128_and(wasm_u16x8_shr(bits, 2), two_bits));
}

// For products, with integer scales, and for the expansion to f32.
extern const tile_format pw_strip_tiles_q4_K, pw_strip_tiles_q5_K, pw_strip_tiles_q6_K;
extern const tile_format pw_strip_panels_q4_K, pw_strip_panels_q5_K, pw_strip_panels_q6_K;
