// What the kernels over f16, bf16 and f32 weights share: sixteen bytes of a row as floats.
//
// Halves are not put in order: of each 32 bits the upper half is one value and the lower half another, in both operands alike.
#pragma once

#include "rows.h"

#include <string.h>

typedef enum { F16, BF16, F32 } float_kind;

#define SIGN_AND_REST ((int32_t) 0x8fffe000)
#define UPPER_HALF ((int32_t) 0xffff0000)

// Sixteen bytes of a row as floats: upper halves and lower halves, or for f32 all in `upper`. Those of f16 are 2^-112 times
// their value: their bits have only been moved, the exponent is not mended (f16.h).
typedef struct {
    v128_t upper, lower;
} floats;

ALWAYS_INLINE floats read_floats(v128_t bytes, float_kind kind) {
    // times 2^13, with the sign extended: one instruction where two shifts would be two
    const v128_t times = wasm_i16x8_make(1 << 13, 0, 1 << 13, 0, 1 << 13, 0, 1 << 13, 0);
    const v128_t mask  = wasm_i32x4_splat(SIGN_AND_REST);
    switch (kind) {
        case F16:  return (floats) {wasm_i32x4_shr(bytes, 3) & mask, wasm_i32x4_dot_i16x8(bytes, times) & mask};
        case BF16: return (floats) {bytes & wasm_i32x4_splat(UPPER_HALF), wasm_i32x4_shl(bytes, 16)};
        default:   return (floats) {bytes, bytes};
    }
}

// Up to sixteen bytes at p, and zeros.
ALWAYS_INLINE v128_t load_up_to(const uint8_t * p, size_t n_bytes) {
    uint8_t bytes[16] = {0};
    if (n_bytes >= sizeof(bytes)) {
        return wasm_v128_load(p);
    }
    memcpy(bytes, p, n_bytes);
    return wasm_v128_load(bytes);
}

// The sums of four vectors of floats, one in each lane.
ALWAYS_INLINE v128_t sum_of_each(const v128_t v[4]) {
    const v128_t low  = wasm_f32x4_add(wasm_i32x4_shuffle(v[0], v[1], 0, 4, 1, 5), wasm_i32x4_shuffle(v[0], v[1], 2, 6, 3, 7));
    const v128_t high = wasm_f32x4_add(wasm_i32x4_shuffle(v[2], v[3], 0, 4, 1, 5), wasm_i32x4_shuffle(v[2], v[3], 2, 6, 3, 7));
    return wasm_f32x4_add(wasm_i64x2_shuffle(low, high, 0, 2), wasm_i64x2_shuffle(low, high, 1, 3));
}
