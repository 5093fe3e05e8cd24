// Super-blocks of 256 weights (q4_K, q5_K, q6_K) against q8_K activations {float d; int8 qs[256]; int16 bsums[16]}, where
// bsums are the sums of 16 qs each.
//
//   q4_K  half d, half dmin; scales[12]; qs[128]            8 groups of 32: w = d * scale[j] * code - dmin * min[j]
//   q5_K  half d, half dmin; scales[12]; qh[32]; qs[128]    the same with a fifth bit
//   q6_K  ql[128]; qh[64]; int8 scales[16]; half d          16 groups of 16: w = d * scale[j] * (code - 32)
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-quants.h"
#include "rows.h"

#include <string.h>

// Lane j of eight 16-bit lanes in all of them.
#define SPLAT16(v, j) wasm_i16x8_shuffle(v, v, j, j, j, j, j, j, j, j)

// The eight scales and eight mins of 6 bits each that q4_K and q5_K pack into 12 bytes, as 16-bit lanes.
ALWAYS_INLINE void unpack_scales(const uint8_t packed[12], v128_t * scales, v128_t * mins) {
    uint32_t u[3];
    memcpy(u, packed, sizeof(u));
    const v128_t bytes = wasm_u32x4_make(u[0] & 0x3f3f3f3f, (u[2] & 0x0f0f0f0f) | ((u[0] >> 6 & 0x03030303) << 4),
                                         u[1] & 0x3f3f3f3f, (u[2] >> 4 & 0x0f0f0f0f) | ((u[1] >> 6 & 0x03030303) << 4));
    *scales = wasm_u16x8_extend_low_u8x16(bytes);
    *mins   = wasm_u16x8_extend_high_u8x16(bytes);
}

// The sums of 32 activations each.
ALWAYS_INLINE v128_t sums_of_32(const block_q8_K * y) {
    const v128_t a = wasm_v128_load(y->bsums), b = wasm_v128_load(y->bsums + 8);
    return wasm_i16x8_add(wasm_i16x8_shuffle(a, b, 0, 2, 4, 6, 8, 10, 12, 14), wasm_i16x8_shuffle(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
}

// Add to each sum what 64 weights give: groups 2j (low nibbles) and 2j + 1 (high ones).
#define ADD_64(j)                                                                                                          \
    do {                                                                                                                   \
        const int8_t * q  = y->qs + 64 * (j);                                                                              \
        const v128_t   y0 = wasm_v128_load(q), y1 = wasm_v128_load(q + 16);                                                \
        const v128_t   y2 = wasm_v128_load(q + 32), y3 = wasm_v128_load(q + 48);                                           \
        for (int r = 0; r < N_ROWS; r++) {                                                                                 \
            const v128_t b0 = wasm_v128_load(qs[r] + 32 * (j)), b1 = wasm_v128_load(qs[r] + 32 * (j) + 16);                \
            v128_t       low0 = low_nibbles(b0), low1 = low_nibbles(b1), high0 = high_nibbles(b0), high1 = high_nibbles(b1); \
            if (has_fifth_bit) {                                                                                           \
                const v128_t h0 = wasm_v128_load(qh[r]), h1 = wasm_v128_load(qh[r] + 16);                                  \
                low0  = wasm_v128_or(low0, fifth_bit(h0, 2 * (j)));                                                        \
                low1  = wasm_v128_or(low1, fifth_bit(h1, 2 * (j)));                                                        \
                high0 = wasm_v128_or(high0, fifth_bit(h0, 2 * (j) + 1));                                                   \
                high1 = wasm_v128_or(high1, fifth_bit(h1, 2 * (j) + 1));                                                   \
            }                                                                                                              \
            const v128_t low  = wasm_i16x8_add(dot_codes(y0, low0), dot_codes(y1, low1));                                  \
            const v128_t high = wasm_i16x8_add(dot_codes(y2, high0), dot_codes(y3, high1));                                \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(low, SPLAT16(scales[r], 2 * (j))));                     \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(high, SPLAT16(scales[r], 2 * (j) + 1)));                \
        }                                                                                                                  \
    } while (0)

// Bytes of 16 where `bit` is set.
ALWAYS_INLINE v128_t fifth_bit(v128_t bytes, int bit) {
    const v128_t which = wasm_i8x16_splat((int8_t) (1 << bit));
    return wasm_v128_and(wasm_i8x16_eq(wasm_v128_and(bytes, which), which), wasm_i8x16_splat(16));
}

ALWAYS_INLINE void rows_with_mins(int64_t n, const uint8_t * const start[N_ROWS + 1], const block_q8_K * y, float * out,
                                  size_t block_bytes, bool has_fifth_bit) {
    const size_t    qs_offset = has_fifth_bit ? offsetof(block_q5_K, qs) : offsetof(block_q4_K, qs);
    const uint8_t * x[N_ROWS] = {start[0], start[1], start[2], start[3]};
    const uint8_t * next      = start[N_ROWS];
    v128_t          acc       = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y++) {
        const v128_t    y_sums = sums_of_32(y);
        const uint8_t * qs[N_ROWS];
        const uint8_t * qh[N_ROWS];
        v128_t          sums[N_ROWS], scales[N_ROWS], mins[N_ROWS];
        for (int r = 0; r < N_ROWS; r++) {
            unpack_scales(x[r] + offsetof(block_q4_K, scales), &scales[r], &mins[r]);
            mins[r] = wasm_i32x4_dot_i16x8(mins[r], y_sums);
            sums[r] = wasm_i32x4_splat(0);
            qs[r]   = x[r] + qs_offset;
            qh[r]   = x[r] + offsetof(block_q5_K, qh);
        }
        ADD_64(0);
        ADD_64(1);
        ADD_64(2);
        ADD_64(3);
        const v128_t head = load_each(x, 0), y_scale = wasm_v128_load32_splat(&y->d);
        const v128_t positive = wasm_f32x4_convert_i32x4(sum_each(sums[0], sums[1], sums[2], sums[3]));
        const v128_t negative = wasm_f32x4_convert_i32x4(sum_each(mins[0], mins[1], mins[2], mins[3]));
        acc = wasm_f32x4_relaxed_madd(positive, wasm_f32x4_mul(f16_low_to_f32(head), y_scale), acc);
        acc = wasm_f32x4_relaxed_nmadd(negative, wasm_f32x4_mul(f16_high_to_f32(head), y_scale), acc);
        next = touch(next, N_ROWS * block_bytes);
        for (int r = 0; r < N_ROWS; r++) {
            x[r] += block_bytes;
        }
    }
    wasm_v128_store(out, acc);
}

void pw_rows_q4_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_with_mins(n, x, (const block_q8_K *) y, out, sizeof(block_q4_K), false);
}

void pw_rows_q5_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_with_mins(n, x, (const block_q8_K *) y, out, sizeof(block_q5_K), true);
}

// Add to each sum what weights 128 h + 32 k + 16 g + 0..15 give for k = 0..3; group 8 h + 2 k + g has one scale.
#define ADD_4_TIMES_16(h, g)                                                                                               \
    do {                                                                                                                   \
        const int8_t * q  = y->qs + 128 * (h) + 16 * (g);                                                                  \
        const v128_t   y0 = wasm_v128_load(q), y1 = wasm_v128_load(q + 32);                                                \
        const v128_t   y2 = wasm_v128_load(q + 64), y3 = wasm_v128_load(q + 96);                                           \
        const v128_t   two_bits = wasm_i8x16_splat(0x30);                                                                  \
        for (int r = 0; r < N_ROWS; r++) {                                                                                 \
            const uint8_t * ql = x[r] + offsetof(block_q6_K, ql) + 64 * (h) + 16 * (g);                                    \
            const v128_t    a = wasm_v128_load(ql), b = wasm_v128_load(ql + 32);                                           \
            const v128_t    bits = wasm_v128_load(x[r] + offsetof(block_q6_K, qh) + 32 * (h) + 16 * (g));                  \
            const v128_t    c0 = wasm_v128_or(low_nibbles(a), wasm_v128_and(wasm_i16x8_shl(bits, 4), two_bits));           \
            const v128_t    c1 = wasm_v128_or(low_nibbles(b), wasm_v128_and(wasm_i16x8_shl(bits, 2), two_bits));           \
            const v128_t    c2 = wasm_v128_or(high_nibbles(a), wasm_v128_and(bits, two_bits));                             \
            const v128_t    c3 = wasm_v128_or(high_nibbles(b), wasm_v128_and(wasm_u16x8_shr(bits, 2), two_bits));          \
            const v128_t    s  = scales[r][h];                                                                             \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y0, c0), SPLAT16(s, 0 + (g))));               \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y1, c1), SPLAT16(s, 2 + (g))));               \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y2, c2), SPLAT16(s, 4 + (g))));               \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y3, c3), SPLAT16(s, 6 + (g))));               \
        }                                                                                                                  \
    } while (0)

void pw_rows_q6_K(int64_t n, const uint8_t * const start[N_ROWS + 1], const uint8_t * activations, float * out) {
    const block_q8_K * y         = (const block_q8_K *) activations;
    const uint8_t *    x[N_ROWS] = {start[0], start[1], start[2], start[3]};
    const uint8_t *    next      = start[N_ROWS];
    v128_t             acc       = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y++) {
        const v128_t low = wasm_v128_load(y->bsums), high = wasm_v128_load(y->bsums + 8);
        v128_t       sums[N_ROWS], scales[N_ROWS][2];
        for (int r = 0; r < N_ROWS; r++) {
            const v128_t bytes = wasm_v128_load(x[r] + offsetof(block_q6_K, scales));
            scales[r][0]       = wasm_i16x8_extend_low_i8x16(bytes);
            scales[r][1]       = wasm_i16x8_extend_high_i8x16(bytes);
            // minus 32 times the activations of every group
            const v128_t bias = wasm_i32x4_add(wasm_i32x4_dot_i16x8(scales[r][0], low), wasm_i32x4_dot_i16x8(scales[r][1], high));
            sums[r]           = wasm_i32x4_neg(wasm_i32x4_shl(bias, 5));
        }
        ADD_4_TIMES_16(0, 0);
        ADD_4_TIMES_16(0, 1);
        ADD_4_TIMES_16(1, 0);
        ADD_4_TIMES_16(1, 1);
        // d is the block's last half: read the two scales before it along
        const v128_t d = f16_high_to_f32(load_each(x, offsetof(block_q6_K, d) - 2));
        const v128_t total = wasm_f32x4_convert_i32x4(sum_each(sums[0], sums[1], sums[2], sums[3]));
        acc = wasm_f32x4_relaxed_madd(total, wasm_f32x4_mul(d, wasm_v128_load32_splat(&y->d)), acc);
        next = touch(next, N_ROWS * sizeof(block_q6_K));
        for (int r = 0; r < N_ROWS; r++) {
            x[r] += sizeof(block_q6_K);
        }
    }
    wasm_v128_store(out, acc);
}
