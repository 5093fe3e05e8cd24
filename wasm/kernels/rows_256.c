// Super-blocks of 256 weights (q4_K, q5_K, q6_K) against q8_K activations {float d; int8 qs[256]; int16 bsums[16]}, where
// bsums are the sums of 16 qs each.
//
//   q4_K  half d, half dmin; scales[12]; qs[128]            8 groups of 32: w = d * scale[j] * code - dmin * min[j]
//   q5_K  half d, half dmin; scales[12]; qh[32]; qs[128]    the same with a fifth bit
//   q6_K  ql[128]; qh[64]; int8 scales[16]; half d          16 groups of 16: w = d * scale[j] * (code - 32)
//
// Each kernel is written for n_rows rows, four or (ggml's dot product) one: see rows.h.
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-quants.h"
#include "codes.h"

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
        for (int r = 0; r < n_rows; r++) {                                                                                 \
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

ALWAYS_INLINE void rows_with_mins(int64_t n, const uint8_t * const start[N_ROWS + 1], const block_q8_K * y, float * out,
                                  size_t block_bytes, bool has_fifth_bit, int n_rows) {
    const size_t    qs_offset = has_fifth_bit ? offsetof(block_q5_K, qs) : offsetof(block_q4_K, qs);
    const uint8_t * x[N_ROWS];
    const uint8_t * next = start_rows(start, x, n_rows);
    v128_t          acc       = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y++) {
        const v128_t    y_sums = sums_of_32(y);
        const uint8_t * qs[N_ROWS];
        const uint8_t * qh[N_ROWS];
        v128_t          sums[N_ROWS], scales[N_ROWS], mins[N_ROWS];
        for (int r = 0; r < n_rows; r++) {
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
        const v128_t head     = load_heads(x, 0, n_rows), y_scale = wasm_v128_load32_splat(&y->d);
        const v128_t positive = wasm_f32x4_convert_i32x4(sums_of_rows(sums, n_rows));
        const v128_t negative = wasm_f32x4_convert_i32x4(sums_of_rows(mins, n_rows));
        acc = wasm_f32x4_relaxed_madd(positive, wasm_f32x4_mul(f16_low_to_f32(head), y_scale), acc);
        acc = wasm_f32x4_relaxed_nmadd(negative, wasm_f32x4_mul(f16_high_to_f32(head), y_scale), acc);
        next = touch(next, (size_t) n_rows * block_bytes);
        for (int r = 0; r < n_rows; r++) {
            x[r] += block_bytes;
        }
    }
    store_rows(out, acc, n_rows);
}

void pw_rows_q4_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_with_mins(n, x, (const block_q8_K *) y, out, sizeof(block_q4_K), false, N_ROWS);
}

void pw_rows_q5_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_with_mins(n, x, (const block_q8_K *) y, out, sizeof(block_q5_K), true, N_ROWS);
}

// Add to each sum what weights 128 h + 32 k + 16 g + 0..15 give for k = 0..3; group 8 h + 2 k + g has one scale.
#define ADD_4_TIMES_16(h, g)                                                                                               \
    do {                                                                                                                   \
        const int8_t * q  = y->qs + 128 * (h) + 16 * (g);                                                                  \
        const v128_t   y0 = wasm_v128_load(q), y1 = wasm_v128_load(q + 32);                                                \
        const v128_t   y2 = wasm_v128_load(q + 64), y3 = wasm_v128_load(q + 96);                                           \
        for (int r = 0; r < n_rows; r++) {                                                                                 \
            v128_t         c[4];                                                                                           \
            q6_K_codes(x[r], h, g, c);                                                                                     \
            const v128_t   s = scales[r][h];                                                                               \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y0, c[0]), SPLAT16(s, 0 + (g))));             \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y1, c[1]), SPLAT16(s, 2 + (g))));             \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y2, c[2]), SPLAT16(s, 4 + (g))));             \
            sums[r] = wasm_i32x4_add(sums[r], wasm_i32x4_dot_i16x8(dot_codes(y3, c[3]), SPLAT16(s, 6 + (g))));             \
        }                                                                                                                  \
    } while (0)

ALWAYS_INLINE void rows_q6_K(int64_t n, const uint8_t * const start[N_ROWS + 1], const block_q8_K * y, float * out, int n_rows) {
    const uint8_t * x[N_ROWS];
    const uint8_t * next = start_rows(start, x, n_rows);
    v128_t          acc  = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y++) {
        const v128_t low = wasm_v128_load(y->bsums), high = wasm_v128_load(y->bsums + 8);
        v128_t       sums[N_ROWS], scales[N_ROWS][2];
        for (int r = 0; r < n_rows; r++) {
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
        const v128_t d     = f16_high_to_f32(load_heads(x, offsetof(block_q6_K, d) - 2, n_rows));
        const v128_t total = wasm_f32x4_convert_i32x4(sums_of_rows(sums, n_rows));
        acc = wasm_f32x4_relaxed_madd(total, wasm_f32x4_mul(d, wasm_v128_load32_splat(&y->d)), acc);
        next = touch(next, (size_t) n_rows * sizeof(block_q6_K));
        for (int r = 0; r < n_rows; r++) {
            x[r] += sizeof(block_q6_K);
        }
    }
    store_rows(out, acc, n_rows);
}

void pw_rows_q6_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_q6_K(n, x, (const block_q8_K *) y, out, N_ROWS);
}

// ggml's dot products of one row.
VEC_DOT(ggml_vec_dot_q4_K_q8_K) {
    rows_with_mins(n / QK_K, one_row(x).start, y, s, sizeof(block_q4_K), false, 1);
}

VEC_DOT(ggml_vec_dot_q5_K_q8_K) {
    rows_with_mins(n / QK_K, one_row(x).start, y, s, sizeof(block_q5_K), true, 1);
}

VEC_DOT(ggml_vec_dot_q6_K_q8_K) {
    rows_q6_K(n / QK_K, one_row(x).start, y, s, 1);
}
