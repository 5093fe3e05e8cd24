// SiLU, SwiGLU and softmax, four values at a time, in place of upstream's (vec.cpp), which has no wasm version and calls expf
// for each. Beyond +-87 SiLU is x or -0 and a softmax weight 0, to the last bit of single precision or within 1e-36.
#include "math_f32.h"

static inline v128_t silu(v128_t x) {
    const v128_t one = wasm_f32x4_splat(1.0f);
    return wasm_f32x4_div(x, wasm_f32x4_add(one, exp_f32(wasm_f32x4_neg(x))));
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
    return wasm_v128_andnot(exp_f32(d), wasm_f32x4_lt(d, wasm_f32x4_splat(-EXP_LIMIT)));
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
