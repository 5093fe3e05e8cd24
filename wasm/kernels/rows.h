// What the kernels over quantized rows share: four rows of weights against one row of activations.
//
// Weights are read as unsigned codes of 7 bits at most, so that the relaxed dot product is one instruction on x86 and exact
// everywhere: i16x8.relaxed_dot_i8x16_i7x16(signed, code) adds products in pairs into 16 bits.
#pragma once

#include "f16.h"

#include <stddef.h>

// Lane j of eight 16-bit lanes in all of them.
#define SPLAT16(v, j) wasm_i16x8_shuffle(v, v, j, j, j, j, j, j, j, j)

// The same of four lanes of 32 bits.
#define SPLAT32(v, i) wasm_i32x4_shuffle(v, v, i, i, i, i)

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define N_ROWS 4

// Hide from the compiler where a pointer comes from. It would step through all rows by one index and add that to each pointer
// before every load; what it does not know it leaves alone, and offsets become part of the loads.
#define OPAQUE(pointer) __asm__("" : "+r"(pointer))

// `value`, calculated before what comes next. The runtime's compiler issues all loads of a basic block before it begins to
// calculate: in a long block that needs many times the registers there are, and moves through memory are then half of the
// code. A branch ends the block, and this one would change the value, were `pointer` ever null, so that the value must be
// known.
ALWAYS_INLINE v128_t calculated(v128_t value, const void * pointer) {
    uintptr_t address = (uintptr_t) pointer;
    __asm__ volatile("" : "+r"(address));
    if (__builtin_expect(address == 0, 0)) {
        __asm__ volatile("" : : "r"(value));
        value = wasm_i32x4_splat(0);
    }
    return value;
}

// False, as no pointer is null, but the compiler does not know. A loop that it ends is one basic block, of which the runtime's
// compiler issues all loads before it begins to calculate: so this keeps the loads of the next step out of the registers.
ALWAYS_INLINE bool is_repeated(const void * pointer) {
    uintptr_t address = (uintptr_t) pointer;
    __asm__("" : "+r"(address));
    return __builtin_expect(address == 0, 0);
}

// Four rows of weights, n blocks each, against y; results in out[0..3].
typedef void (*rows_kernel)(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);

void pw_rows_q4_0(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q4_1(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q5_0(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q5_1(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q8_0(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_iq4_nl(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q4_K(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q5_K(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q6_K(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q2_K(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_q3_K(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_tq2_0(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_iq4_xs(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_mxfp4(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_f16(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_bf16(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);
void pw_rows_f32(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out);

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

ALWAYS_INLINE v128_t twice_high_nibbles(v128_t bytes) {
    return wasm_v128_and(wasm_u16x8_shr(bytes, 3), wasm_i8x16_splat(30));
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

// --- For kernels written for n_rows rows, four or one, where n_rows is a constant.

// ggml's dot product of one row: n values of x and y, the result in s[0].
#define VEC_DOT(name) \
    void name(int n, float * s, size_t unused_bs, const void * x, size_t unused_bx, const void * y, size_t unused_by, int unused_nrc)

ALWAYS_INLINE float sum_of_lanes(v128_t v) {
    v = wasm_f32x4_add(v, wasm_i32x4_shuffle(v, v, 2, 3, 0, 1));
    return wasm_f32x4_extract_lane(v, 0) + wasm_f32x4_extract_lane(v, 1);
}
