// Rows of f16, bf16 and f32 against activations of the same type, and ggml's dot products of f16 and bf16, for one or four rows
// (see rows.h). n is the number of values, any.
//
// Halves are not put in order: of each 32 bits the upper half is one value and the lower half another, in both operands alike.
#include "rows.h"

#include "ggml.h"

#include <string.h>

// f16: the bits of a weight moved into those of a float are 2^-112 times its value, those of an activation are mended and made
// 2^FAR times theirs, so that neither the products nor their sums come near the ends of what a float holds.
#define FAR 0x1p56f

typedef enum { F16, BF16 } half_kind;

#define SIGN_AND_REST ((int32_t) 0x8fffe000)

ALWAYS_INLINE v128_t upper_weights(v128_t halves, half_kind kind) {
    return kind == F16 ? wasm_v128_and(wasm_i32x4_shr(halves, 3), wasm_i32x4_splat(SIGN_AND_REST))
                       : wasm_v128_and(halves, wasm_i32x4_splat((int32_t) 0xffff0000));
}

ALWAYS_INLINE v128_t lower_weights(v128_t halves, half_kind kind) {
    // times 2^13, with the sign extended: one instruction where two shifts would be two
    const v128_t times = wasm_i16x8_make(1 << 13, 0, 1 << 13, 0, 1 << 13, 0, 1 << 13, 0);
    return kind == F16 ? wasm_v128_and(wasm_i32x4_dot_i16x8(halves, times), wasm_i32x4_splat(SIGN_AND_REST))
                       : wasm_i32x4_shl(halves, 16);
}

ALWAYS_INLINE v128_t upper_values(v128_t halves, half_kind kind) {
    return kind == F16 ? wasm_f32x4_mul(f16_high_to_f32(halves), wasm_f32x4_splat(FAR)) : upper_weights(halves, kind);
}

ALWAYS_INLINE v128_t lower_values(v128_t halves, half_kind kind) {
    return kind == F16 ? wasm_f32x4_mul(f16_low_to_f32(halves), wasm_f32x4_splat(FAR)) : lower_weights(halves, kind);
}

// Up to seven halves at p, and zeros.
ALWAYS_INLINE v128_t load_rest(const uint8_t * p, int64_t n) {
    uint8_t halves[16] = {0};
    memcpy(halves, p, (size_t) n * 2);
    return wasm_v128_load(halves);
}

#define N_SUMS 8

// Add what eight halves give to a row's two sums.
#define ADD_8(sum, w, y)                                                                                              \
    do {                                                                                                                   \
        sums[sum]     = wasm_f32x4_relaxed_madd(upper_weights(w, kind), upper_values(y, kind), sums[sum]);                 \
        sums[sum + 1] = wasm_f32x4_relaxed_madd(lower_weights(w, kind), lower_values(y, kind), sums[sum + 1]);             \
    } while (0)

// Four rows eight values at a time, or one row 32 at a time: eight sums, as a chain of additions waits for each.
ALWAYS_INLINE void rows_of_halves(int64_t n, const uint8_t * const start[N_ROWS + 1], const uint8_t * y, float * out,
                                  half_kind kind, int n_rows) {
    const int64_t   n_parts = N_ROWS / n_rows, step = 8 * n_parts;
    const uint8_t * x[N_ROWS];
    const uint8_t * next = start_rows(start, x, n_rows);
    v128_t          sums[N_SUMS];
    for (int i = 0; i < N_SUMS; i++) {
        sums[i] = wasm_f32x4_splat(0.0f);
    }
    int64_t i = 0;
    for (; i + step <= n; i += step, y += 2 * step) {
        for (int part = 0; part < n_parts; part++) {
            const v128_t values = wasm_v128_load(y + 16 * part);
            for (int r = 0; r < n_rows; r++) {
                ADD_8(2 * (r * n_parts + part), wasm_v128_load(x[r] + 16 * part), values);
            }
        }
        for (int r = 0; r < n_rows; r++) {
            x[r] += 2 * step;
        }
        next = touch(next, (size_t) (2 * step * n_rows));
    }
    for (; i < n; i += 8, y += 16) {
        const int64_t rest   = n - i < 8 ? n - i : 8;
        const v128_t  values = load_rest(y, rest);
        for (int r = 0; r < n_rows; r++) {
            ADD_8(2 * r * n_parts, load_rest(x[r], rest), values);
            x[r] += 16;
        }
    }
    const float unit = kind == F16 ? 0x1p112f / FAR : 1.0f;
    for (int r = 0; r < n_rows; r++) {
        v128_t sum = wasm_f32x4_splat(0.0f);
        for (int64_t j = 2 * r * n_parts; j < 2 * (r + 1) * n_parts; j++) {
            sum = wasm_f32x4_add(sum, sums[j]);
        }
        out[r] = sum_of_lanes(sum) * unit;
    }
}

void pw_rows_f16(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_of_halves(n, x, y, out, F16, N_ROWS);
}

void pw_rows_bf16(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_of_halves(n, x, y, out, BF16, N_ROWS);
}

void pw_rows_f32(int64_t n, const uint8_t * const start[N_ROWS + 1], const uint8_t * activations, float * out) {
    const float * x[N_ROWS];
    const float * y = (const float *) activations;
    v128_t        sums[N_ROWS];
    for (int r = 0; r < N_ROWS; r++) {
        x[r]    = (const float *) start[r];
        sums[r] = wasm_f32x4_splat(0.0f);
    }
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const v128_t values = wasm_v128_load(y + i);
        for (int r = 0; r < N_ROWS; r++) {
            sums[r] = wasm_f32x4_relaxed_madd(wasm_v128_load(x[r] + i), values, sums[r]);
        }
    }
    for (int r = 0; r < N_ROWS; r++) {
        out[r] = sum_of_lanes(sums[r]);
        for (int64_t j = i; j < n; j++) {
            out[r] += x[r][j] * y[j];
        }
    }
}

void ggml_vec_dot_f16(int n, float * s, size_t unused_bs, const ggml_fp16_t * x, size_t unused_bx, const ggml_fp16_t * y,
                      size_t unused_by, int unused_nrc) {
    rows_of_halves(n, one_row(x).start, (const uint8_t *) y, s, F16, 1);
}

void ggml_vec_dot_bf16(int n, float * s, size_t unused_bs, const ggml_bf16_t * x, size_t unused_bx, const ggml_bf16_t * y,
                       size_t unused_by, int unused_nrc) {
    rows_of_halves(n, one_row(x).start, (const uint8_t *) y, s, BF16, 1);
}
