// What the kernels over super-blocks of 256 weights share (rows_256.c, rows_256_small.c): they differ in what one block gives.
//
// Rows are taken one after another and read as they lie in memory, which the processor's own prefetching follows. Four rows
// side by side would share loads of activations, but rows of more than a few kilobytes then come from memory at half the rate.
#pragma once

#include "codes.h"

// A block of weights times a block of activations: 32-bit sums, and the block's scale (or scale and minimum) in half precision
// in every lane. Sums of mins are taken off.
typedef struct {
    v128_t sums, mins;
    v128_t head;
} block_sums;

// Where `head` has the scale of sums; in D_AND_DMIN the high half is the scale of mins.
typedef enum { D_LOW, D_HIGH, D_AND_DMIN } head_256;

typedef block_sums (*block_kernel)(const uint8_t * x, const block_q8_K * y);

// The sums of activations, 16 each, times as many 16-bit factors.
ALWAYS_INLINE v128_t dot_bsums(const v128_t factors[2], const block_q8_K * y) {
    return wasm_i32x4_add(wasm_i32x4_dot_i16x8(factors[0], wasm_v128_load(y->bsums)),
                          wasm_i32x4_dot_i16x8(factors[1], wasm_v128_load(y->bsums + 8)));
}

ALWAYS_INLINE float row_256(int64_t n, const uint8_t * x, const block_q8_K * y, size_t block_bytes, head_256 head_is,
                            block_kernel kernel) {
    v128_t acc = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++) {
        const block_sums block   = kernel(x, y);
        const v128_t     y_scale = wasm_v128_load32_splat(&y->d);
        const v128_t     d       = head_is == D_HIGH ? f16_high_to_f32(block.head) : f16_low_to_f32(block.head);
        acc = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(block.sums), wasm_f32x4_mul(d, y_scale), acc);
        if (head_is == D_AND_DMIN) {
            const v128_t dmin = wasm_f32x4_mul(f16_high_to_f32(block.head), y_scale);
            acc = wasm_f32x4_relaxed_nmadd(wasm_f32x4_convert_i32x4(block.mins), dmin, acc);
        }
        x += block_bytes;
        y++;
        OPAQUE(x);
        OPAQUE(y);
    }
    return sum_of_lanes(acc);
}

// The kernels of one format: of four rows, and ggml's dot product of one.
#define KERNELS_256(type, head_is, kernel)                                                                                 \
    static void rows_##type(int64_t n, const uint8_t * const * x, int n_rows, const void * y, float * out) {               \
        for (int r = 0; r < n_rows; r++) {                                                                                 \
            out[r] = row_256(n, x[r], y, sizeof(block_##type), head_is, kernel);                                           \
        }                                                                                                                  \
    }                                                                                                                      \
    void pw_rows_##type(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out) {                  \
        rows_##type(n, x, N_ROWS, y, out);                                                                                 \
    }                                                                                                                      \
    VEC_DOT(ggml_vec_dot_##type##_q8_K) {                                                                                  \
        const uint8_t * row = x;                                                                                           \
        rows_##type(n / QK_K, &row, 1, y, s);                                                                              \
    }
