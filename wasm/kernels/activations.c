// SiLU, SwiGLU and softmax, four values at a time, in place of upstream's (vec.cpp), which has no wasm version and calls expf
// for each. The exponential is the polynomial of ggml's own versions for x86 and Arm, without their far ends: beyond +-87 SiLU
// is x or -0 and a softmax weight 0, to the last bit of single precision or within 1e-36.
#include <stdint.h>
#include <string.h>
#include <wasm_simd128.h>

#define LIMIT 87.0f

// exp(x), to two units in the last place, for |x| <= LIMIT; anything further out as LIMIT. NaN stays NaN.
static inline v128_t exp_f32(v128_t x) {
    // pmin and pmax keep a first operand of NaN
    x = wasm_f32x4_pmin(wasm_f32x4_pmax(x, wasm_f32x4_splat(-LIMIT)), wasm_f32x4_splat(LIMIT));
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

static inline v128_t silu(v128_t x) {
    const v128_t one = wasm_f32x4_splat(1.0f);
    return wasm_f32x4_div(x, wasm_f32x4_add(one, exp_f32(wasm_f32x4_neg(x))));
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

void ggml_vec_silu_f32(const int n, float * y, const float * x) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        wasm_v128_store(y + i, silu(wasm_v128_load(x + i)));
    }
    store_rest(y + i, silu(load_rest(x + i, n - i)), n - i);
}

// y = silu(x) * g
void ggml_vec_swiglu_f32(const int n, float * y, const float * x, const float * g) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        wasm_v128_store(y + i, wasm_f32x4_mul(silu(wasm_v128_load(x + i)), wasm_v128_load(g + i)));
    }
    store_rest(y + i, wasm_f32x4_mul(silu(load_rest(x + i, n - i)), load_rest(g + i, n - i)), n - i);
}

static inline v128_t weight_of(v128_t x, v128_t max) {
    const v128_t d = wasm_f32x4_sub(x, max);
    return wasm_v128_andnot(exp_f32(d), wasm_f32x4_lt(d, wasm_f32x4_splat(-LIMIT)));
}

// y = exp(x - max); returns the sum.
double ggml_vec_soft_max_f32(const int n, float * y, const float * x, float max) {
    const v128_t largest = wasm_f32x4_splat(max);
    v128_t       sums    = wasm_f64x2_splat(0.0);
    int          i       = 0;
    for (; i + 4 <= n; i += 4) {
        const v128_t v = weight_of(wasm_v128_load(x + i), largest);
        wasm_v128_store(y + i, v);
        sums = wasm_f64x2_add(sums, wasm_f64x2_promote_low_f32x4(v));
        sums = wasm_f64x2_add(sums, wasm_f64x2_promote_low_f32x4(wasm_i32x4_shuffle(v, v, 2, 3, 0, 1)));
    }
    float rest[4];
    wasm_v128_store(rest, weight_of(load_rest(x + i, n - i), largest));
    double sum = wasm_f64x2_extract_lane(sums, 0) + wasm_f64x2_extract_lane(sums, 1);
    for (int j = 0; i + j < n; j++) {
        y[i + j] = rest[j];
        sum += rest[j];
    }
    return sum;
}
