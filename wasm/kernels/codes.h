// How the formats pack the bits of their codes and scales; layouts are in rows_32.c, rows_256.c and rows_256_small.c.
#pragma once

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "rows.h"

#include <string.h>

// Byte i is 16 where bit i of `bits` is set.
ALWAYS_INLINE v128_t fifth_bits(v128_t bits, int first) {
    const v128_t which = wasm_i8x16_make(1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128);
    const v128_t from  = first ? wasm_i8x16_make(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3)
                               : wasm_i8x16_make(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const v128_t spread = wasm_v128_and(wasm_i8x16_relaxed_swizzle(bits, from), which);
    return wasm_v128_and(wasm_i8x16_eq(spread, which), wasm_i8x16_splat(16));
}

// Bytes of 16 where `bit` is set.
ALWAYS_INLINE v128_t fifth_bit(v128_t bytes, int bit) {
    const v128_t which = wasm_i8x16_splat((int8_t) (1 << bit));
    return wasm_v128_and(wasm_i8x16_eq(wasm_v128_and(bytes, which), which), wasm_i8x16_splat(16));
}

// The eight scales and eight mins of 6 bits each that q4_K and q5_K pack into three words, as 16-bit lanes. Scales 0..3 are the
// low six bits of w0's bytes, mins 0..3 those of w1; 4..7 have their low four bits in nibbles of w2, the high two on top of
// w0 and w1. The four bytes before (d and dmin) are read along.
ALWAYS_INLINE void unpack_scales(const uint8_t packed[12], v128_t * scales, v128_t * mins) {
    const v128_t words = wasm_v128_load(packed - 4);
    const v128_t w0011 = wasm_i32x4_shuffle(words, words, 1, 1, 2, 2);
    const v128_t w22   = wasm_i32x4_shuffle(words, wasm_u16x8_shr(words, 4), 3, 3, 7, 7);
    const v128_t low   = wasm_v128_and(w0011, wasm_i8x16_splat(0x3f));
    const v128_t high  = wasm_v128_or(low_nibbles(w22), wasm_v128_and(wasm_u16x8_shr(w0011, 2), wasm_i8x16_splat(0x30)));
    *scales = wasm_u16x8_extend_low_u8x16(wasm_i32x4_shuffle(low, high, 0, 4, 1, 5));
    *mins   = wasm_u16x8_extend_low_u8x16(wasm_i32x4_shuffle(low, high, 2, 6, 3, 7));
}

// The four codes of 6 bits, 0 to 63, of weights 128 h + 32 k + 16 g + 0..15 of a q6_K block, k = 0..3.
ALWAYS_INLINE void q6_K_codes(const uint8_t * x, int h, int g, v128_t codes[4]) {
    const uint8_t * ql       = x + offsetof(block_q6_K, ql) + 64 * h + 16 * g;
    const v128_t    two_bits = wasm_i8x16_splat(0x30);
    const v128_t    a = wasm_v128_load(ql), b = wasm_v128_load(ql + 32);
    const v128_t    bits = wasm_v128_load(x + offsetof(block_q6_K, qh) + 32 * h + 16 * g);
    codes[0] = wasm_v128_or(low_nibbles(a), wasm_v128_and(wasm_i16x8_shl(bits, 4), two_bits));
    codes[1] = wasm_v128_or(low_nibbles(b), wasm_v128_and(wasm_i16x8_shl(bits, 2), two_bits));
    codes[2] = wasm_v128_or(high_nibbles(a), wasm_v128_and(bits, two_bits));
    codes[3] = wasm_v128_or(high_nibbles(b), wasm_v128_and(wasm_u16x8_shr(bits, 2), two_bits));
}

// The sixteen scales of 6 bits that q3_K packs into 12 bytes, less 32, as bytes.
ALWAYS_INLINE v128_t unpack_scales_q3_K(const uint8_t packed[12]) {
    uint32_t u[3];
    memcpy(u, packed, sizeof(u));
    const v128_t low  = wasm_u32x4_make(u[0], u[1], u[0] >> 4, u[1] >> 4);
    const v128_t high = wasm_u32x4_make(u[2] << 4, u[2] << 2, u[2], u[2] >> 2);
    const v128_t both = wasm_v128_or(wasm_v128_and(low, wasm_i8x16_splat(0x0f)), wasm_v128_and(high, wasm_i8x16_splat(0x30)));
    return wasm_i8x16_sub(both, wasm_i8x16_splat(32));
}

// The eight scales of 6 bits, less 32, as 16-bit lanes: the low four bits are nibbles of `low`, the high two are pairs of `high`.
ALWAYS_INLINE v128_t unpack_scales_iq4_xs(const uint8_t * block) {
    const v128_t low    = wasm_v128_load32_zero(block + offsetof(block_iq4_xs, scales_l));
    const v128_t high   = wasm_v128_load16_splat(block + offsetof(block_iq4_xs, scales_h));
    // two bytes of `high` times 4^(7 - j) have pair j in bits 14 and 15
    const v128_t power  = wasm_i16x8_make(1 << 14, 1 << 12, 1 << 10, 1 << 8, 1 << 6, 1 << 4, 1 << 2, 1);
    const v128_t pairs  = wasm_v128_and(wasm_u16x8_shr(wasm_i16x8_mul(high, power), 10), wasm_i16x8_splat(0x30));
    const v128_t nibbles = wasm_u16x8_extend_low_u8x16(wasm_i8x16_shuffle(low_nibbles(low), high_nibbles(low), 0, 16, 1, 17, 2, 18,
                                                                          3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    return wasm_i16x8_sub(wasm_v128_or(pairs, nibbles), wasm_i16x8_splat(32));
}

// The low byte of each lane as a scale: an exponent e that stands for 2^(e - 128), which is subnormal up to 1.
ALWAYS_INLINE v128_t e8m0_to_f32(v128_t lanes) {
    const v128_t e         = wasm_v128_and(lanes, wasm_i32x4_splat(255));
    const v128_t normal    = wasm_i32x4_shl(wasm_i32x4_sub(e, wasm_i32x4_splat(1)), 23);
    const v128_t subnormal = wasm_i32x4_shl(wasm_i32x4_add(e, wasm_i32x4_splat(1)), 21);
    return wasm_v128_bitselect(normal, subnormal, wasm_i32x4_gt(e, wasm_i32x4_splat(1)));
}
