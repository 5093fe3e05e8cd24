// Functions of four floats at a time, for the kernels that calculate them for each value of a row.
#pragma once

#include <stddef.h>
#include <string.h>
#include <wasm_simd128.h>

#define EXP_LIMIT 87.0f

// exp(x), to two units in the last place, for |x| <= EXP_LIMIT; anything further out as that. NaN stays NaN.
// The polynomial of ggml's own versions for x86 and Arm, without their far ends.
static inline v128_t exp_f32(v128_t x) {
    // pmin and pmax keep a first operand of NaN
    x = wasm_f32x4_pmin(wasm_f32x4_pmax(x, wasm_f32x4_splat(-EXP_LIMIT)), wasm_f32x4_splat(EXP_LIMIT));
    const v128_t shift = wasm_f32x4_splat(0x1.8p23f);  // leaves the nearest integer in the low bits
    const v128_t z     = wasm_f32x4_relaxed_madd(x, wasm_f32x4_splat(0x1.715476p+0f), shift);
    const v128_t n     = wasm_f32x4_sub(z, shift);
    v128_t       b     = wasm_f32x4_relaxed_nmadd(n, wasm_f32x4_splat(0x1.62e4p-1f), x);
    b                  = wasm_f32x4_relaxed_nmadd(n, wasm_f32x4_splat(0x1.7f7d1cp-20f), b);
    const v128_t power = wasm_i32x4_add(wasm_i32x4_shl(z, 23), wasm_f32x4_splat(1.0f));
    const v128_t u     = wasm_f32x4_mul(b, b);
    const v128_t high  = wasm_f32x4_relaxed_madd(wasm_f32x4_splat(0x1.0e4020p-7f), b, wasm_f32x4_splat(0x1.573e2ep-5f));
    const v128_t mid   = wasm_f32x4_relaxed_madd(wasm_f32x4_splat(0x1.555e66p-3f), b, wasm_f32x4_splat(0x1.fffdb6p-2f));
    const v128_t j     = wasm_f32x4_relaxed_madd(wasm_f32x4_relaxed_madd(high, u, mid), u,
                                                 wasm_f32x4_mul(wasm_f32x4_splat(0x1.ffffecp-1f), b));
    return wasm_f32x4_relaxed_madd(j, power, power);
}

// erf(x), to two units in the last place: a polynomial near zero, 1 - exp(another) further out. NaN stays NaN.
static inline v128_t erf_f32(v128_t x) {
    const v128_t t = wasm_f32x4_abs(x), s = wasm_f32x4_mul(x, x);
    v128_t       far = wasm_f32x4_relaxed_madd(wasm_f32x4_splat(-1.72853470e-5f), t, wasm_f32x4_splat(3.83197126e-4f));
    const v128_t mid = wasm_f32x4_relaxed_madd(wasm_f32x4_splat(-3.88396438e-3f), t, wasm_f32x4_splat(2.42546219e-2f));
    far              = wasm_f32x4_relaxed_madd(far, s, mid);
    far              = wasm_f32x4_relaxed_madd(far, t, wasm_f32x4_splat(-1.06777877e-1f));
    far              = wasm_f32x4_relaxed_madd(far, t, wasm_f32x4_splat(-6.34846687e-1f));
    far              = wasm_f32x4_relaxed_madd(far, t, wasm_f32x4_splat(-1.28717512e-1f));
    far              = wasm_f32x4_relaxed_madd(far, t, wasm_f32x4_neg(t));
    far              = wasm_f32x4_sub(wasm_f32x4_splat(1.0f), exp_f32(far));
    far              = wasm_v128_bitselect(x, far, wasm_i32x4_splat((int32_t) 0x80000000));  // the sign of x
    v128_t near      = wasm_f32x4_relaxed_madd(wasm_f32x4_splat(-5.96761703e-4f), s, wasm_f32x4_splat(4.99119423e-3f));
    near             = wasm_f32x4_relaxed_madd(near, s, wasm_f32x4_splat(-2.67681349e-2f));
    near             = wasm_f32x4_relaxed_madd(near, s, wasm_f32x4_splat(1.12819925e-1f));
    near             = wasm_f32x4_relaxed_madd(near, s, wasm_f32x4_splat(-3.76125336e-1f));
    near             = wasm_f32x4_relaxed_madd(near, s, wasm_f32x4_splat(1.28379166e-1f));
    near             = wasm_f32x4_relaxed_madd(near, x, x);
    return wasm_v128_bitselect(far, near, wasm_f32x4_gt(t, wasm_f32x4_splat(0x1.dbp-1f)));
}

// Up to three values, and zeros.
static inline v128_t load_rest(const float * p, int n) {
    float values[4] = {0};
    memcpy(values, p, (size_t) n * sizeof(float));
    return wasm_v128_load(values);
}

static inline void store_rest(float * p, v128_t v, int n) {
    float values[4];
    wasm_v128_store(values, v);
    memcpy(p, values, (size_t) n * sizeof(float));
}
