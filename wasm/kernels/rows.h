// What the kernels over quantized rows share: four rows of weights against one row of activations.
//
// Weights are read as unsigned codes of 7 bits at most, so that the relaxed dot product is one instruction on x86 and exact
// everywhere: i16x8.relaxed_dot_i8x16_i7x16(signed, code) adds products in pairs into 16 bits.
#pragma once

#include "f16.h"

#include <stddef.h>

// Lane j of eight 16-bit lanes in all of them.
#define SPLAT16(v, j) wasm_i16x8_shuffle(v, v, j, j, j, j, j, j, j, j)

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define N_ROWS 4

// Four rows of weights, n blocks each, against y; results in out[0..3]. x[N_ROWS] is where as many bytes will be read next, or null.
typedef void (*rows_kernel)(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);

void pw_rows_q4_0(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q4_1(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q5_0(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q5_1(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q8_0(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_iq4_nl(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q4_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q5_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q6_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q2_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_q3_K(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_tq2_0(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_iq4_xs(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_mxfp4(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_f16(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_bf16(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);
void pw_rows_f32(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out);

// The sums of a, b, c and d, one in each lane.
ALWAYS_INLINE v128_t sum_each(v128_t a, v128_t b, v128_t c, v128_t d) {
    const v128_t ab = wasm_i32x4_add(wasm_i32x4_shuffle(a, b, 0, 2, 4, 6), wasm_i32x4_shuffle(a, b, 1, 3, 5, 7));
    const v128_t cd = wasm_i32x4_add(wasm_i32x4_shuffle(c, d, 0, 2, 4, 6), wasm_i32x4_shuffle(c, d, 1, 3, 5, 7));
    return wasm_i32x4_add(wasm_i32x4_shuffle(ab, cd, 0, 2, 4, 6), wasm_i32x4_shuffle(ab, cd, 1, 3, 5, 7));
}

// The 32 bits at `offset` of each row.
ALWAYS_INLINE v128_t load_each(const uint8_t * const x[N_ROWS], size_t offset) {
    v128_t lanes = wasm_v128_load32_zero(x[0] + offset);
    lanes        = wasm_v128_load32_lane(x[1] + offset, lanes, 1);
    lanes        = wasm_v128_load32_lane(x[2] + offset, lanes, 2);
    return wasm_v128_load32_lane(x[3] + offset, lanes, 3);
}

ALWAYS_INLINE v128_t low_nibbles(v128_t bytes) {
    return wasm_v128_and(bytes, wasm_i8x16_splat(15));
}

ALWAYS_INLINE v128_t high_nibbles(v128_t bytes) {
    return wasm_v128_and(wasm_u16x8_shr(bytes, 4), wasm_i8x16_splat(15));
}

ALWAYS_INLINE v128_t dot_codes(v128_t y, v128_t codes) {
    return wasm_i16x8_relaxed_dot_i8x16_i7x16(y, codes);
}

// All bits of a byte where it is negative: a comparison, which the compiler would turn into a shift of bytes, five instructions
// on x86, if it knew the zero.
ALWAYS_INLINE v128_t signs(v128_t bytes) {
    v128_t zero = wasm_i8x16_splat(0);
    __asm__("" : "+r"(zero));
    return wasm_i8x16_lt(bytes, zero);
}

// --- For kernels written for n_rows rows, four or one, where n_rows is a constant. With four, a lane is a row; with one, the
// lanes are parts of its sums, put together at the end.

// ggml's dot product of one row: n values of x and y, the result in s[0].
#define VEC_DOT(name) \
    void name(int n, float * s, size_t unused_bs, const void * x, size_t unused_bx, const void * y, size_t unused_by, int unused_nrc)

typedef struct {
    const uint8_t * start[N_ROWS + 1];
} row_starts;

ALWAYS_INLINE row_starts one_row(const void * x) {
    return (row_starts) {{x}};
}

// The rows' first blocks into x; where to read ahead.
ALWAYS_INLINE const uint8_t * start_rows(const uint8_t * const start[N_ROWS + 1], const uint8_t * x[N_ROWS], int n_rows) {
    for (int r = 0; r < n_rows; r++) {
        x[r] = start[r];
    }
    return n_rows == 1 ? NULL : start[N_ROWS];
}

ALWAYS_INLINE v128_t load_heads(const uint8_t * const x[N_ROWS], size_t offset, int n_rows) {
    return n_rows == 1 ? wasm_v128_load32_splat(x[0] + offset) : load_each(x, offset);
}

ALWAYS_INLINE v128_t sums_of_rows(const v128_t sums[N_ROWS], int n_rows) {
    return n_rows == 1 ? sums[0] : sum_each(sums[0], sums[1], sums[2], sums[3]);
}

ALWAYS_INLINE float sum_of_lanes(v128_t v) {
    v = wasm_f32x4_add(v, wasm_i32x4_shuffle(v, v, 2, 3, 0, 1));
    return wasm_f32x4_extract_lane(v, 0) + wasm_f32x4_extract_lane(v, 1);
}

ALWAYS_INLINE void store_rows(float * out, v128_t sums, int n_rows) {
    if (n_rows == 1) {
        out[0] = sum_of_lanes(sums);
    } else {
        wasm_v128_store(out, sums);
    }
}

// Have n bytes from p on in the cache soon, and return what follows them: four interleaved streams are more than the processor's own prefetching follows, and
// wasm has no instruction for it. A load nobody waits for does.
ALWAYS_INLINE const uint8_t * touch(const uint8_t * p, size_t n) {
    if (!p) {
        return p;
    }
    for (size_t i = 0; i < n; i += 64) {
        (void) *(const volatile uint8_t *) (p + i);
    }
    return p + n;
}
