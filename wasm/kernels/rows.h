// What the kernels over quantized rows share: four rows of weights against one row of activations.
//
// Weights are read as unsigned codes of 7 bits at most, so that the relaxed dot product is one instruction on x86 and exact
// everywhere: i16x8.relaxed_dot_i8x16_i7x16(signed, code) adds products in pairs into 16 bits.
#pragma once

#include "f16.h"

#include <stddef.h>

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
