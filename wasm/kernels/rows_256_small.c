// Super-blocks of 256 weights of two to four bits (q2_K, q3_K, tq2_0, iq4_xs) against q8_K activations {float d; int8 qs[256];
// int16 bsums[16]}, where bsums are the sums of 16 qs each. One or four rows: see rows.h.
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
#include "codes.h"

// The k-th two bits of every byte.
#define TWO_BITS(bytes, k) wasm_v128_and((k) ? wasm_u16x8_shr(bytes, 2 * (k)) : (bytes), wasm_i8x16_splat(3))

// Bit `bit` of every byte as a 4.
#define THIRD_BIT(bytes, bit)                                                                                              \
    wasm_v128_and((bit) < 2 ? wasm_i16x8_shl(bytes, (bit) < 2 ? 2 - (bit) : 0) : wasm_u16x8_shr(bytes, (bit) < 2 ? 0 : (bit) - 2), \
                  wasm_i8x16_splat(4))

// Add to each sum what weights 128 h + 32 k + 16 g + 0..15 give for k = 0..3.
#define ADD_4_TIMES_16(h, g)                                                                                               \
    do {                                                                                                                   \
        const int8_t * q  = y->qs + 128 * (h) + 16 * (g);                                                                  \
        const v128_t   y0 = wasm_v128_load(q), y1 = wasm_v128_load(q + 32);                                                \
        const v128_t   y2 = wasm_v128_load(q + 64), y3 = wasm_v128_load(q + 96);                                           \
        for (int r = 0; r < n_rows; r++) {                                                                                 \
            const v128_t bytes = wasm_v128_load(x[r] + qs_offset + 32 * (h) + 16 * (g));                                   \
            v128_t c0 = TWO_BITS(bytes, 0), c1 = TWO_BITS(bytes, 1), c2 = TWO_BITS(bytes, 2), c3 = TWO_BITS(bytes, 3);     \
            if (has_third_bit) {                                                                                           \
                const v128_t bits = wasm_v128_load(x[r] + offsetof(block_q3_K, hmask) + 16 * (g));                         \
                c0 = wasm_v128_or(c0, THIRD_BIT(bits, 4 * (h)));                                                           \
                c1 = wasm_v128_or(c1, THIRD_BIT(bits, 4 * (h) + 1));                                                       \
                c2 = wasm_v128_or(c2, THIRD_BIT(bits, 4 * (h) + 2));                                                       \
                c3 = wasm_v128_or(c3, THIRD_BIT(bits, 4 * (h) + 3));                                                       \
            }                                                                                                              \
            const v128_t s = scales[r][h];                                                                                 \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y0, c0), SPLAT16(s, 0 + (g))));               \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y1, c1), SPLAT16(s, 2 + (g))));               \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y2, c2), SPLAT16(s, 4 + (g))));               \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y3, c3), SPLAT16(s, 6 + (g))));               \
        }                                                                                                                  \
    } while (0)

ALWAYS_INLINE void rows_q2_K(int64_t n, const uint8_t * const start[N_ROWS + 1], const block_q8_K * y, float * out, int n_rows) {
    const bool      has_third_bit = false;
    const size_t    qs_offset     = offsetof(block_q2_K, qs);
    const uint8_t * x[N_ROWS];
    const uint8_t * next = start_rows(start, x, n_rows);
    v128_t          acc  = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y++) {
        const v128_t y_low = wasm_v128_load(y->bsums), y_high = wasm_v128_load(y->bsums + 8);
        v128_t       sums[N_ROWS], mins[N_ROWS], scales[N_ROWS][2];
        for (int r = 0; r < n_rows; r++) {
            const v128_t both = wasm_v128_load(x[r] + offsetof(block_q2_K, scales));
            const v128_t low = low_nibbles(both), high = high_nibbles(both);
            scales[r][0] = wasm_u16x8_extend_low_u8x16(low);
            scales[r][1] = wasm_u16x8_extend_high_u8x16(low);
            mins[r]      = wasm_i32x4_add(wasm_i32x4_dot_i16x8(wasm_u16x8_extend_low_u8x16(high), y_low),
                                          wasm_i32x4_dot_i16x8(wasm_u16x8_extend_high_u8x16(high), y_high));
            sums[r]      = wasm_i32x4_splat(0);
        }
        ADD_4_TIMES_16(0, 0);
        ADD_4_TIMES_16(0, 1);
        ADD_4_TIMES_16(1, 0);
        ADD_4_TIMES_16(1, 1);
        const v128_t head     = load_heads(x, offsetof(block_q2_K, d), n_rows), y_scale = wasm_v128_load32_splat(&y->d);
        const v128_t positive = wasm_f32x4_convert_i32x4(sums_of_rows(sums, n_rows));
        const v128_t negative = wasm_f32x4_convert_i32x4(sums_of_rows(mins, n_rows));
        acc = wasm_f32x4_relaxed_madd(positive, wasm_f32x4_mul(f16_low_to_f32(head), y_scale), acc);
        acc = wasm_f32x4_relaxed_nmadd(negative, wasm_f32x4_mul(f16_high_to_f32(head), y_scale), acc);
        next = touch(next, (size_t) n_rows * sizeof(block_q2_K));
        for (int r = 0; r < n_rows; r++) {
            x[r] += sizeof(block_q2_K);
        }
    }
    store_rows(out, acc, n_rows);
}

ALWAYS_INLINE void rows_q3_K(int64_t n, const uint8_t * const start[N_ROWS + 1], const block_q8_K * y, float * out, int n_rows) {
    const bool      has_third_bit = true;
    const size_t    qs_offset     = offsetof(block_q3_K, qs);
    const uint8_t * x[N_ROWS];
    const uint8_t * next = start_rows(start, x, n_rows);
    v128_t          acc  = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y++) {
        const v128_t y_low = wasm_v128_load(y->bsums), y_high = wasm_v128_load(y->bsums + 8);
        v128_t       sums[N_ROWS], scales[N_ROWS][2];
        for (int r = 0; r < n_rows; r++) {
            const v128_t bytes = unpack_scales_q3_K(x[r] + offsetof(block_q3_K, scales));
            scales[r][0]       = wasm_i16x8_extend_low_i8x16(bytes);
            scales[r][1]       = wasm_i16x8_extend_high_i8x16(bytes);
            // minus 4 times the activations of every group
            const v128_t bias = wasm_i32x4_add(wasm_i32x4_dot_i16x8(scales[r][0], y_low),
                                               wasm_i32x4_dot_i16x8(scales[r][1], y_high));
            sums[r]           = wasm_i32x4_neg(wasm_i32x4_shl(bias, 2));
        }
        ADD_4_TIMES_16(0, 0);
        ADD_4_TIMES_16(0, 1);
        ADD_4_TIMES_16(1, 0);
        ADD_4_TIMES_16(1, 1);
        // d is the block's last half: read the two scales before it along
        const v128_t d     = f16_high_to_f32(load_heads(x, offsetof(block_q3_K, d) - 2, n_rows));
        const v128_t total = wasm_f32x4_convert_i32x4(sums_of_rows(sums, n_rows));
        acc  = wasm_f32x4_relaxed_madd(total, wasm_f32x4_mul(d, wasm_v128_load32_splat(&y->d)), acc);
        next = touch(next, (size_t) n_rows * sizeof(block_q3_K));
        for (int r = 0; r < n_rows; r++) {
            x[r] += sizeof(block_q3_K);
        }
    }
    store_rows(out, acc, n_rows);
}

// Codes up to 3, no scales within the block: 16 bits hold the sums of all 256 weights.
ALWAYS_INLINE void rows_tq2_0(int64_t n, const uint8_t * const start[N_ROWS + 1], const block_q8_K * y, float * out, int n_rows) {
    const uint8_t * x[N_ROWS];
    const uint8_t * next = start_rows(start, x, n_rows);
    v128_t          acc  = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y++) {
        // minus the sum of all activations
        const v128_t bias = wasm_i16x8_neg(wasm_i16x8_add(wasm_v128_load(y->bsums), wasm_v128_load(y->bsums + 8)));
        v128_t       pairs[N_ROWS], sums[N_ROWS];
        for (int r = 0; r < n_rows; r++) {
            pairs[r] = bias;
        }
        for (int part = 0; part < 4; part++) {
            const int8_t * q  = y->qs + 128 * (part / 2) + 16 * (part % 2);
            const v128_t   y0 = wasm_v128_load(q), y1 = wasm_v128_load(q + 32);
            const v128_t   y2 = wasm_v128_load(q + 64), y3 = wasm_v128_load(q + 96);
            for (int r = 0; r < n_rows; r++) {
                const v128_t bytes = wasm_v128_load(x[r] + offsetof(block_tq2_0, qs) + 16 * part);
                const v128_t a = wasm_i16x8_add(dot_codes(y0, TWO_BITS(bytes, 0)), dot_codes(y1, TWO_BITS(bytes, 1)));
                const v128_t b = wasm_i16x8_add(dot_codes(y2, TWO_BITS(bytes, 2)), dot_codes(y3, TWO_BITS(bytes, 3)));
                pairs[r]       = wasm_i16x8_add(pairs[r], wasm_i16x8_add(a, b));
            }
        }
        for (int r = 0; r < n_rows; r++) {
            sums[r] = wasm_i32x4_extadd_pairwise_i16x8(pairs[r]);
        }
        const v128_t d     = f16_high_to_f32(load_heads(x, offsetof(block_tq2_0, d) - 2, n_rows));
        const v128_t total = wasm_f32x4_convert_i32x4(sums_of_rows(sums, n_rows));
        acc  = wasm_f32x4_relaxed_madd(total, wasm_f32x4_mul(d, wasm_v128_load32_splat(&y->d)), acc);
        next = touch(next, (size_t) n_rows * sizeof(block_tq2_0));
        for (int r = 0; r < n_rows; r++) {
            x[r] += sizeof(block_tq2_0);
        }
    }
    store_rows(out, acc, n_rows);
}

// Add to each sum what 32 weights give. The activation's sign goes over to the weight, whose table has no -128; sums of two
// products of 127 * 127 still fit 16 bits.
ALWAYS_INLINE void add_32(const int8_t * y, const uint8_t * const qs[N_ROWS], int j, const v128_t scales[N_ROWS],
                          v128_t sums[N_ROWS], int n_rows) {
    const v128_t table = wasm_v128_load(kvalues_iq4nl), y0 = wasm_v128_load(y), y1 = wasm_v128_load(y + 16);
    const v128_t sign0 = signs(y0), sign1 = signs(y1);
    const v128_t size0 = wasm_i8x16_abs(y0), size1 = wasm_i8x16_abs(y1);
    for (int r = 0; r < n_rows; r++) {
        const v128_t bytes = wasm_v128_load(qs[r] + 16 * j);
        const v128_t a     = wasm_i8x16_relaxed_swizzle(table, low_nibbles(bytes));
        const v128_t b     = wasm_i8x16_relaxed_swizzle(table, high_nibbles(bytes));
        const v128_t low   = dot_codes(wasm_i8x16_sub(wasm_v128_xor(a, sign0), sign0), size0);
        const v128_t high  = dot_codes(wasm_i8x16_sub(wasm_v128_xor(b, sign1), sign1), size1);
        const v128_t scale = j ? SPLAT16(scales[r], 1) : SPLAT16(scales[r], 0);
        sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(low, scale));
        sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(high, scale));
    }
}

ALWAYS_INLINE void rows_iq4_xs(int64_t n, const uint8_t * const start[N_ROWS + 1], const block_q8_K * y, float * out, int n_rows) {
    const uint8_t * x[N_ROWS];
    const uint8_t * next = start_rows(start, x, n_rows);
    v128_t          acc  = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y++) {
        const uint8_t * qs[N_ROWS];
        v128_t          sums[N_ROWS], scales[N_ROWS];
        for (int r = 0; r < n_rows; r++) {
            scales[r] = unpack_scales_iq4_xs(x[r]);
            sums[r]   = wasm_i32x4_splat(0);
            qs[r]     = x[r] + offsetof(block_iq4_xs, qs);
        }
#pragma clang loop unroll(disable)
        for (int j = 0; j < QK_K; j += 64) {
            add_32(y->qs + j, qs, 0, scales, sums, n_rows);
            add_32(y->qs + j + 32, qs, 1, scales, sums, n_rows);
            for (int r = 0; r < n_rows; r++) {
                scales[r] = wasm_i16x8_shuffle(scales[r], scales[r], 2, 3, 4, 5, 6, 7, 0, 1);
                qs[r] += 32;
            }
        }
        const v128_t d     = f16_low_to_f32(load_heads(x, offsetof(block_iq4_xs, d), n_rows));
        const v128_t total = wasm_f32x4_convert_i32x4(sums_of_rows(sums, n_rows));
        acc  = wasm_f32x4_relaxed_madd(total, wasm_f32x4_mul(d, wasm_v128_load32_splat(&y->d)), acc);
        next = touch(next, (size_t) n_rows * sizeof(block_iq4_xs));
        for (int r = 0; r < n_rows; r++) {
            x[r] += sizeof(block_iq4_xs);
        }
    }
    store_rows(out, acc, n_rows);
}

void pw_rows_q2_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_q2_K(n, x, (const block_q8_K *) y, out, N_ROWS);
}

void pw_rows_q3_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_q3_K(n, x, (const block_q8_K *) y, out, N_ROWS);
}

void pw_rows_tq2_0(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_tq2_0(n, x, (const block_q8_K *) y, out, N_ROWS);
}

void pw_rows_iq4_xs(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_iq4_xs(n, x, (const block_q8_K *) y, out, N_ROWS);
}

VEC_DOT(ggml_vec_dot_q2_K_q8_K) {
    rows_q2_K(n / QK_K, one_row(x).start, y, s, 1);
}

VEC_DOT(ggml_vec_dot_q3_K_q8_K) {
    rows_q3_K(n / QK_K, one_row(x).start, y, s, 1);
}

VEC_DOT(ggml_vec_dot_tq2_0_q8_K) {
    rows_tq2_0(n / QK_K, one_row(x).start, y, s, 1);
}

VEC_DOT(ggml_vec_dot_iq4_xs_q8_K) {
    rows_iq4_xs(n / QK_K, one_row(x).start, y, s, 1);
}
