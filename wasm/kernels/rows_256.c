// Super-blocks of 256 weights (q4_K, q5_K, q6_K) against q8_K activations {float d; int8 qs[256]; int16 bsums[16]}, where
// bsums are the sums of 16 qs each.
//
//   q4_K  half d, half dmin; scales[12]; qs[128]            8 groups of 32: w = d * scale[j] * code - dmin * min[j]
//   q5_K  half d, half dmin; scales[12]; qh[32]; qs[128]    the same with a fifth bit
//   q6_K  ql[128]; qh[64]; int8 scales[16]; half d          16 groups of 16: w = d * scale[j] * (code - 32)
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-quants.h"
#include "rows_256.h"

// The sums of 32 activations each.
ALWAYS_INLINE v128_t sums_of_32(const block_q8_K * y) {
    return wasm_i16x8_narrow_i32x4(wasm_i32x4_extadd_pairwise_i16x8(wasm_v128_load(y->bsums)),
                                   wasm_i32x4_extadd_pairwise_i16x8(wasm_v128_load(y->bsums + 8)));
}

// q5_K: bits 2j and 2j + 1 of every byte as a 16 and a 32.
#define FIFTH_BITS(bytes, j)                                                                                               \
    ((j) < 2 ? wasm_i16x8_shl(bytes, (j) < 2 ? 4 - 2 * (j) : 0) : wasm_u16x8_shr(bytes, (j) < 2 ? 0 : 2 * (j) - 4))

// Add to the sum what 64 weights give: groups 2j (low nibbles) and 2j + 1 (high ones). With a fifth bit, codes of the high ones
// are taken twice, which spares shifting their bits: two products of 62 * 127, twice, still fit 16 bits.
#define ADD_64(j)                                                                                                          \
    do {                                                                                                                   \
        const int8_t *  q  = y->qs + 64 * (j);                                                                             \
        const uint8_t * qs = x + qs_offset + 32 * (j);                                                                     \
        const v128_t    b0 = wasm_v128_load(qs), b1 = wasm_v128_load(qs + 16);                                             \
        v128_t          c0 = low_nibbles(b0), c1 = low_nibbles(b1), c2, c3;                                                \
        if (has_fifth_bit) {                                                                                               \
            const uint8_t * qh = x + offsetof(block_q5_K, qh);                                                             \
            const v128_t    h0 = FIFTH_BITS(wasm_v128_load(qh), j), h1 = FIFTH_BITS(wasm_v128_load(qh + 16), j);           \
            c0 = wasm_v128_or(c0, wasm_v128_and(h0, wasm_i8x16_splat(16)));                                                \
            c1 = wasm_v128_or(c1, wasm_v128_and(h1, wasm_i8x16_splat(16)));                                                \
            c2 = wasm_v128_or(twice_high_nibbles(b0), wasm_v128_and(h0, wasm_i8x16_splat(32)));                            \
            c3 = wasm_v128_or(twice_high_nibbles(b1), wasm_v128_and(h1, wasm_i8x16_splat(32)));                            \
        } else {                                                                                                           \
            c2 = high_nibbles(b0);                                                                                         \
            c3 = high_nibbles(b1);                                                                                         \
        }                                                                                                                  \
        const v128_t low  = wasm_i16x8_add(dot_codes(wasm_v128_load(q), c0), dot_codes(wasm_v128_load(q + 16), c1));       \
        const v128_t high = wasm_i16x8_add(dot_codes(wasm_v128_load(q + 32), c2), dot_codes(wasm_v128_load(q + 48), c3));  \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(low, SPLAT16(scales, 2 * (j))));                                  \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(high, SPLAT16(scales, 2 * (j) + 1)));                             \
        sums = calculated(sums, x);                                                                                        \
    } while (0)

ALWAYS_INLINE block_sums block_with_mins(const uint8_t * x, const block_q8_K * y, bool has_fifth_bit) {
    const size_t qs_offset = has_fifth_bit ? offsetof(block_q5_K, qs) : offsetof(block_q4_K, qs);
    v128_t       sums = wasm_i32x4_splat(0), scales, mins;
    unpack_scales(x + offsetof(block_q4_K, scales), &scales, &mins);
    if (has_fifth_bit) {
        scales = wasm_i16x8_add(scales, wasm_v128_and(scales, wasm_i32x4_splat(0xffff)));
    }
    mins = wasm_i32x4_dot_i16x8(mins, sums_of_32(y));
    ADD_64(0);
    ADD_64(1);
    ADD_64(2);
    ADD_64(3);
    return (block_sums) {.sums = sums, .mins = mins, .head = wasm_v128_load32_splat(x)};
}

ALWAYS_INLINE block_sums block_of_q4_K(const uint8_t * x, const block_q8_K * y) {
    return block_with_mins(x, y, false);
}

ALWAYS_INLINE block_sums block_of_q5_K(const uint8_t * x, const block_q8_K * y) {
    block_sums block = block_with_mins(x, y, true);
    // all of it was taken twice
    block.sums = wasm_i32x4_shr(block.sums, 1);
    return block;
}

// Add to the sum what weights 128 h + 32 k + 16 g + 0..15 give for k = 0..3; group 8 h + 2 k + g has one scale.
#define ADD_4_TIMES_16(h, g)                                                                                               \
    do {                                                                                                                   \
        const int8_t * q = y->qs + 128 * (h) + 16 * (g);                                                                   \
        const v128_t   s = scales[h];                                                                                      \
        v128_t         c[4];                                                                                               \
        q6_K_codes(x, h, g, c);                                                                                            \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(dot_codes(wasm_v128_load(q), c[0]), SPLAT16(s, 0 + (g))));        \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(dot_codes(wasm_v128_load(q + 32), c[1]), SPLAT16(s, 2 + (g))));   \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(dot_codes(wasm_v128_load(q + 64), c[2]), SPLAT16(s, 4 + (g))));   \
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(dot_codes(wasm_v128_load(q + 96), c[3]), SPLAT16(s, 6 + (g))));   \
        sums = calculated(sums, x);                                                                                        \
    } while (0)

ALWAYS_INLINE block_sums block_of_q6_K(const uint8_t * x, const block_q8_K * y) {
    const v128_t bytes     = wasm_v128_load(x + offsetof(block_q6_K, scales));
    const v128_t scales[2] = {wasm_i16x8_extend_low_i8x16(bytes), wasm_i16x8_extend_high_i8x16(bytes)};
    // minus 32 times the activations of every group
    v128_t sums = wasm_i32x4_neg(wasm_i32x4_shl(dot_bsums(scales, y), 5));
    ADD_4_TIMES_16(0, 0);
    ADD_4_TIMES_16(0, 1);
    ADD_4_TIMES_16(1, 0);
    ADD_4_TIMES_16(1, 1);
    // d is the block's last half: read the two scales before it along
    return (block_sums) {.sums = sums, .head = wasm_v128_load32_splat(x + offsetof(block_q6_K, d) - 2)};
}

KERNELS_256(q4_K, D_AND_DMIN, block_of_q4_K)
KERNELS_256(q5_K, D_AND_DMIN, block_of_q5_K)
KERNELS_256(q6_K, D_HIGH, block_of_q6_K)
