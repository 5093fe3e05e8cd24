// The forms of GELU, four values at a time, in place of upstream's (vec.h).
//
// ggml looks GELU and quick GELU of floats up in a table of all halves, on every processor: a model's results are those of the
// table. Here the values are turned to halves and back four at a time, and only the looking up is done one by one; to the
// last bit the same. GELU by the error function is calculated; upstream calls erff for each value.
#include "f16.h"
#include "math_f32.h"
#include "simd-mappings.h"

extern ggml_fp16_t ggml_table_gelu_f16[1 << 16];
extern ggml_fp16_t ggml_table_gelu_quick_f16[1 << 16];

#define TABLE_END 10.0f     // where upstream takes the function for 0, or for x
#define LARGEST   65504.0f  // of half precision

typedef v128_t (*function)(v128_t x);

// The halves of a table at four places, in single precision. All are finite.
static inline v128_t look_up(const ggml_fp16_t * table, v128_t places) {
    v128_t high = wasm_i32x4_splat(0);  // in the upper halves of the lanes
    high        = wasm_v128_load16_lane(table + (uint32_t) wasm_i32x4_extract_lane(places, 0), high, 1);
    high        = wasm_v128_load16_lane(table + (uint32_t) wasm_i32x4_extract_lane(places, 1), high, 3);
    high        = wasm_v128_load16_lane(table + (uint32_t) wasm_i32x4_extract_lane(places, 2), high, 5);
    high        = wasm_v128_load16_lane(table + (uint32_t) wasm_i32x4_extract_lane(places, 3), high, 7);
    return f16_high_to_f32(high);
}

static inline v128_t is_low(v128_t x) {
    return wasm_f32x4_le(x, wasm_f32x4_splat(-TABLE_END));
}

static inline v128_t gelu(v128_t x) {
    const v128_t in_table = wasm_f32x4_lt(wasm_f32x4_abs(x), wasm_f32x4_splat(TABLE_END));
    return wasm_v128_bitselect(look_up(ggml_table_gelu_f16, f32_to_f16(x)), wasm_v128_andnot(x, is_low(x)), in_table);  // NaN stays
}

// f16.h has no infinities and no NaN, this table has, and takes them.
static inline v128_t gelu_quick(v128_t x) {
    const v128_t in_table = wasm_f32x4_le(wasm_f32x4_abs(x), wasm_f32x4_splat(LARGEST));
    const v128_t found    = look_up(ggml_table_gelu_quick_f16, f32_to_f16(x));
    if (__builtin_expect(wasm_i32x4_all_true(in_table), 1)) {
        return found;
    }
    float values[4], results[4];
    wasm_v128_store(values, x);
    wasm_v128_store(results, found);
    for (int i = 0; i < 4; i++) {
        if (!(__builtin_fabsf(values[i]) <= LARGEST)) {
            results[i] = GGML_CPU_FP16_TO_FP32(ggml_table_gelu_quick_f16[GGML_CPU_FP32_TO_FP16(values[i])]);
        }
    }
    return wasm_v128_load(results);
}

static inline v128_t gelu_erf(v128_t x) {
    const v128_t e = erf_f32(wasm_f32x4_mul(x, wasm_f32x4_splat(0.70710678118654752440084436210484f)));
    return wasm_f32x4_mul(wasm_f32x4_mul(wasm_f32x4_splat(0.5f), x), wasm_f32x4_add(wasm_f32x4_splat(1.0f), e));
}

// y = f(x), times g where there is one. What is 0 by itself stays so, whatever g and its sign.
static inline __attribute__((always_inline)) v128_t gated(v128_t x, v128_t g, function f) {
    const v128_t v = wasm_f32x4_mul(f(x), g);
    return f == gelu ? wasm_v128_andnot(v, is_low(x)) : v;
}

static inline __attribute__((always_inline)) void map(int n, float * y, const float * x, const float * g, function f) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        const v128_t v = wasm_v128_load(x + i);
        wasm_v128_store(y + i, g ? gated(v, wasm_v128_load(g + i), f) : f(v));
    }
    if (i < n) {
        const v128_t v = load_rest(x + i, n - i);
        store_rest(y + i, g ? gated(v, load_rest(g + i, n - i), f) : f(v), n - i);
    }
}

void pw_vec_gelu_f32(int n, float * y, const float * x) {
    map(n, y, x, NULL, gelu);
}

void pw_vec_gelu_erf_f32(int n, float * y, const float * x) {
    map(n, y, x, NULL, gelu_erf);
}

void pw_vec_gelu_quick_f32(int n, float * y, const float * x) {
    map(n, y, x, NULL, gelu_quick);
}

// y = gelu(x) * g
void pw_vec_geglu_f32(int n, float * y, const float * x, const float * g) {
    map(n, y, x, g, gelu);
}

void pw_vec_geglu_erf_f32(int n, float * y, const float * x, const float * g) {
    map(n, y, x, g, gelu_erf);
}

void pw_vec_geglu_quick_f32(int n, float * y, const float * x, const float * g) {
    map(n, y, x, g, gelu_quick);
}
