// Super-blocks of 256 weights of two to four bits (q2_K, q3_K, tq2_0, iq4_xs) against q8_K activations {float d; int8 qs[256];
// int16 bsums[16]}, where bsums are the sums of 16 qs each.
//
//   q2_K    scales[16]; qs[64]; half d, half dmin    16 groups of 16: w = d * (scale & 15) * code - dmin * (scale >> 4)
//   q3_K    hmask[32]; qs[64]; scales[12]; half d    16 groups of 16: w = d * (scale[j] - 32) * (code - 4), the third bit in hmask
//   tq2_0   qs[64]; half d                           w = d * (code - 1)
//   iq4_xs  half d; u16 high; low[4]; qs[128]        8 groups of 32: w = d * (scale[j] - 32) * table[nibble], signed
//
// Two bits: weight 128 h + 32 k + l is bits 2k and 2k + 1 of qs[32 h + l]. Its group of 16 is 8 h + 2 k + l / 16.
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-quants.h"
#include "rows_256.h"

// The k-th two bits of every byte.
#define TWO_BITS(bytes, k) wasm_v128_and((k) ? wasm_u16x8_shr(bytes, 2 * (k)) : (bytes), wasm_i8x16_splat(3))

// Bit `bit` of every byte as a 4.
#define THIRD_BIT(bytes, bit)                                                                                              \
    wasm_v128_and((bit) < 2 ? wasm_i16x8_shl(bytes, (bit) < 2 ? 2 - (bit) : 0) : wasm_u16x8_shr(bytes, (bit) < 2 ? 0 : (bit) - 2), \
                  wasm_i8x16_splat(4))

// Add to the sum what weights 128 h + 32 k + 16 g + 0..15 give for k = 0..3.
#define ADD_4_TIMES_16(h, g)                                                                                               \
    do {                                                                                                                   \
        const int8_t * q     = y->qs + 128 * (h) + 16 * (g);                                                               \
        const v128_t   bytes = wasm_v128_load(x + qs_offset + 32 * (h) + 16 * (g)), s = scales[h];                         \
        v128_t c0 = TWO_BITS(bytes, 0), c1 = TWO_BITS(bytes, 1), c2 = TWO_BITS(bytes, 2), c3 = TWO_BITS(bytes, 3);         \
        if (has_third_bit) {                                                                                               \
            const v128_t bits = wasm_v128_load(x + offsetof(block_q3_K, hmask) + 16 * (g));                                \
            c0 = wasm_v128_or(c0, THIRD_BIT(bits, 4 * (h)));                                                               \
            c1 = wasm_v128_or(c1, THIRD_BIT(bits, 4 * (h) + 1));                                                           \
            c2 = wasm_v128_or(c2, THIRD_BIT(bits, 4 * (h) + 2));                                                           \
            c3 = wasm_v128_or(c3, THIRD_BIT(bits, 4 * (h) + 3));                                                           \
        }                                                                                                                  \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(dot_codes(wasm_v128_load(q), c0), SPLAT16(s, 0 + (g))));          \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(dot_codes(wasm_v128_load(q + 32), c1), SPLAT16(s, 2 + (g))));     \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(dot_codes(wasm_v128_load(q + 64), c2), SPLAT16(s, 4 + (g))));     \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(dot_codes(wasm_v128_load(q + 96), c3), SPLAT16(s, 6 + (g))));     \
        sums = calculated(sums, x);                                                                                        \
    } while (0)

ALWAYS_INLINE block_sums block_of_q2_K(const uint8_t * x, const block_q8_K * y) {
    const bool   has_third_bit = false;
    const size_t qs_offset     = offsetof(block_q2_K, qs);
    const v128_t both = wasm_v128_load(x + offsetof(block_q2_K, scales)), low = low_nibbles(both), high = high_nibbles(both);
    const v128_t scales[2] = {wasm_u16x8_extend_low_u8x16(low), wasm_u16x8_extend_high_u8x16(low)};
    const v128_t mins[2]   = {wasm_u16x8_extend_low_u8x16(high), wasm_u16x8_extend_high_u8x16(high)};
    v128_t       sums      = wasm_i32x4_splat(0);
    ADD_4_TIMES_16(0, 0);
    ADD_4_TIMES_16(0, 1);
    ADD_4_TIMES_16(1, 0);
    ADD_4_TIMES_16(1, 1);
    return (block_sums) {.sums = sums, .mins = dot_bsums(mins, y), .head = wasm_v128_load32_splat(x + offsetof(block_q2_K, d))};
}

ALWAYS_INLINE block_sums block_of_q3_K(const uint8_t * x, const block_q8_K * y) {
    const bool   has_third_bit = true;
    const size_t qs_offset     = offsetof(block_q3_K, qs);
    const v128_t bytes         = unpack_scales_q3_K(x + offsetof(block_q3_K, scales));
    const v128_t scales[2]     = {wasm_i16x8_extend_low_i8x16(bytes), wasm_i16x8_extend_high_i8x16(bytes)};
    // minus 4 times the activations of every group
    v128_t sums = wasm_i32x4_neg(wasm_i32x4_shl(dot_bsums(scales, y), 2));
    ADD_4_TIMES_16(0, 0);
    ADD_4_TIMES_16(0, 1);
    ADD_4_TIMES_16(1, 0);
    ADD_4_TIMES_16(1, 1);
    // d is the block's last half: read the two scales before it along
    return (block_sums) {.sums = sums, .head = wasm_v128_load32_splat(x + offsetof(block_q3_K, d) - 2)};
}

// Codes up to 3, no scales within the block: 16 bits hold the sums of all 256 weights.
ALWAYS_INLINE block_sums block_of_tq2_0(const uint8_t * x, const block_q8_K * y) {
    // minus the sum of all activations
    v128_t pairs = wasm_i16x8_neg(wasm_i16x8_add(wasm_v128_load(y->bsums), wasm_v128_load(y->bsums + 8)));
    for (int part = 0; part < 4; part++) {
        const int8_t * q     = y->qs + 128 * (part / 2) + 16 * (part % 2);
        const v128_t   bytes = wasm_v128_load(x + offsetof(block_tq2_0, qs) + 16 * part);
        const v128_t   a = wasm_i16x8_add(dot_codes(wasm_v128_load(q), TWO_BITS(bytes, 0)),
                                          dot_codes(wasm_v128_load(q + 32), TWO_BITS(bytes, 1)));
        const v128_t   b = wasm_i16x8_add(dot_codes(wasm_v128_load(q + 64), TWO_BITS(bytes, 2)),
                                          dot_codes(wasm_v128_load(q + 96), TWO_BITS(bytes, 3)));
        pairs = calculated(wasm_i16x8_add(pairs, wasm_i16x8_add(a, b)), x);
    }
    return (block_sums) {.sums = wasm_i32x4_extadd_pairwise_i16x8(pairs),
                         .head = wasm_v128_load32_splat(x + offsetof(block_tq2_0, d) - 2)};
}

// Add to the sum what 32 weights give. The activation's sign goes over to the weight, whose table has no -128; sums of two
// products of 127 * 127 still fit 16 bits.
ALWAYS_INLINE v128_t dot_32(const int8_t * y, const uint8_t * qs, v128_t scale) {
    const v128_t table = wasm_v128_load(kvalues_iq4nl), bytes = wasm_v128_load(qs);
    const v128_t y0 = wasm_v128_load(y), y1 = wasm_v128_load(y + 16);
    const v128_t sign0 = signs(y0), sign1 = signs(y1);
    const v128_t a    = wasm_i8x16_relaxed_swizzle(table, low_nibbles(bytes));
    const v128_t b    = wasm_i8x16_relaxed_swizzle(table, high_nibbles(bytes));
    const v128_t low  = dot_codes(wasm_i8x16_sub(wasm_v128_xor(a, sign0), sign0), wasm_i8x16_abs(y0));
    const v128_t high = dot_codes(wasm_i8x16_sub(wasm_v128_xor(b, sign1), sign1), wasm_i8x16_abs(y1));
    return wasm_i32x4_add(wasm_i32x4_dot_i16x8(low, scale), wasm_i32x4_dot_i16x8(high, scale));
}

// Groups j and j + 1.
#define ADD_64(j)                                                                                                          \
    do {                                                                                                                   \
        const uint8_t * qs = x + offsetof(block_iq4_xs, qs) + 16 * (j);                                                    \
        sums = wasm_i32x4_add(sums, dot_32(y->qs + 32 * (j), qs, SPLAT16(scales, j)));                                     \
        sums = wasm_i32x4_add(sums, dot_32(y->qs + 32 * (j) + 32, qs + 16, SPLAT16(scales, (j) + 1)));                     \
        sums = calculated(sums, x);                                                                                        \
    } while (0)

ALWAYS_INLINE block_sums block_of_iq4_xs(const uint8_t * x, const block_q8_K * y) {
    const v128_t scales = unpack_scales_iq4_xs(x);
    v128_t       sums   = wasm_i32x4_splat(0);
    ADD_64(0);
    ADD_64(2);
    ADD_64(4);
    ADD_64(6);
    return (block_sums) {.sums = sums, .head = wasm_v128_load32_splat(x + offsetof(block_iq4_xs, d))};
}

KERNELS_256(q2_K, D_AND_DMIN, block_of_q2_K)
KERNELS_256(q3_K, D_HIGH, block_of_q3_K)
KERNELS_256(tq2_0, D_HIGH, block_of_tq2_0)
KERNELS_256(iq4_xs, D_LOW, block_of_iq4_xs)
