// Half precision without tables: four values at a time, by moving the bits into a float and mending its exponent.
//
//   f16: s eeeee mmmmmmmmmm      f32: s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm      exponents differ by 112
//
// Finite values, subnormal ones included, are exact; infinities and NaN become numbers of 65536 and more, which no weight,
// scale or cache entry of a working model is.
#pragma once

#include <stdint.h>
#include <wasm_simd128.h>

// The upper half of every 32-bit lane; what the lower half holds does not matter.
static inline v128_t f16_high_to_f32(v128_t lanes) {
    const v128_t bits = wasm_v128_and(wasm_i32x4_shr(lanes, 3), wasm_i32x4_splat((int32_t) 0x8fffe000));
    return wasm_f32x4_mul(bits, wasm_f32x4_splat(0x1p112f));
}

static inline v128_t f16_low_to_f32(v128_t lanes) {
    return f16_high_to_f32(wasm_i32x4_shl(lanes, 16));
}

// Four consecutive values.
static inline v128_t f16x4_load(const void * p) {
    const v128_t zero = wasm_i32x4_splat(0);
    return f16_high_to_f32(wasm_i16x8_shuffle(zero, wasm_v128_load64_zero(p), 0, 8, 1, 9, 2, 10, 3, 11));
}

// Eight consecutive values, as two vectors.
static inline void f16x8_load(const void * p, v128_t * low, v128_t * high) {
    const v128_t zero = wasm_i32x4_splat(0), halves = wasm_v128_load(p);
    *low  = f16_high_to_f32(wasm_i16x8_shuffle(zero, halves, 0, 8, 1, 9, 2, 10, 3, 11));
    *high = f16_high_to_f32(wasm_i16x8_shuffle(zero, halves, 4, 12, 5, 13, 6, 14, 7, 15));
}

// Four floats to half precision, rounded to nearest even: ggml's bit-exact conversion, four at a time. In the low halves.
static inline v128_t f32_to_f16(v128_t f) {
    const v128_t magnitude = wasm_f32x4_mul(wasm_f32x4_mul(wasm_f32x4_abs(f), wasm_f32x4_splat(0x1p112f)), wasm_f32x4_splat(0x1p-110f));
    const v128_t twice     = wasm_i32x4_shl(f, 1);
    const v128_t exponent  = wasm_v128_and(twice, wasm_i32x4_splat((int32_t) 0xff000000));
    const v128_t bias      = wasm_u32x4_max(exponent, wasm_i32x4_splat(0x71000000));
    const v128_t bits      = wasm_f32x4_add(wasm_i32x4_add(wasm_u32x4_shr(bias, 1), wasm_i32x4_splat(0x07800000)), magnitude);
    const v128_t unsigned_half = wasm_i32x4_add(wasm_v128_and(wasm_u32x4_shr(bits, 13), wasm_i32x4_splat(0x7c00)),
                                                wasm_v128_and(bits, wasm_i32x4_splat(0x0fff)));
    const v128_t is_nan = wasm_u32x4_gt(twice, wasm_i32x4_splat((int32_t) 0xff000000));
    const v128_t half   = wasm_v128_bitselect(wasm_i32x4_splat(0x7e00), unsigned_half, is_nan);
    return wasm_v128_or(half, wasm_v128_and(wasm_u32x4_shr(f, 16), wasm_i32x4_splat(0x8000)));
}

static inline void f16x4_store(void * p, v128_t f) {
    wasm_v128_store64_lane(p, wasm_u16x8_narrow_i32x4(f32_to_f16(f), wasm_i32x4_splat(0)), 0);
}
