// Activations to 8 bits: q8_0, q8_1 and q8_K, in place of upstream's wasm versions (arch/wasm/quants.c). The first two of those cut the fraction off where
// every other architecture rounds, which doubles the error, pulls every value towards zero and shows as logits up to 7
// off native's. Rounding here is to nearest, ties to even, with 127 / max as the factor: bit for bit what x86 does.
//
//   block_q8_0 { half d;         int8 qs[32]; }   x[i] = d * qs[i]
//   block_q8_1 { half d; half s; int8 qs[32]; }   ... and s = d * sum(qs), for weights with an offset
//   block_q8_K { float d; int8 qs[256]; int16 bsums[16]; }   with the sums of 16 qs each
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-quants.h"
#include "quants.h"
#include "simd-mappings.h"

#include <assert.h>
#include <wasm_simd128.h>

#define N_VECTORS (QK8_0 / 4)

_Static_assert(QK8_0 == 32 && QK8_1 == 32, "both blocks hold 32 values");

static inline float horizontal_max(v128_t v) {
    v = wasm_f32x4_pmax(v, wasm_i32x4_shuffle(v, v, 2, 3, 0, 1));
    v = wasm_f32x4_pmax(v, wasm_i32x4_shuffle(v, v, 1, 0, 3, 2));
    return wasm_f32x4_extract_lane(v, 0);
}

static inline int32_t horizontal_sum(v128_t v) {
    v = wasm_i32x4_add(v, wasm_i32x4_shuffle(v, v, 2, 3, 0, 1));
    v = wasm_i32x4_add(v, wasm_i32x4_shuffle(v, v, 1, 0, 3, 2));
    return wasm_i32x4_extract_lane(v, 0);
}

// Quantize 32 floats into qs; return the scale and, through sum, the sum of the quantized values.
static inline float quantize_block(const float * x, int8_t * qs, int32_t * sum) {
    v128_t values[N_VECTORS];
    v128_t largest = wasm_f32x4_splat(0.0f);
    for (int j = 0; j < N_VECTORS; j++) {
        values[j] = wasm_v128_load(x + 4 * j);
        largest   = wasm_f32x4_pmax(largest, wasm_f32x4_abs(values[j]));
    }
    const float  max    = horizontal_max(largest);
    const v128_t factor = wasm_f32x4_splat(max != 0.0f ? 127.0f / max : 0.0f);

    v128_t total = wasm_i32x4_splat(0);
    for (int j = 0; j < N_VECTORS; j++) {
        values[j] = wasm_i32x4_relaxed_trunc_f32x4(wasm_f32x4_nearest(wasm_f32x4_mul(values[j], factor)));
        total     = wasm_i32x4_add(total, values[j]);
    }
    for (int j = 0; j < N_VECTORS; j += 4) {
        const v128_t low  = wasm_i16x8_narrow_i32x4(values[j + 0], values[j + 1]);
        const v128_t high = wasm_i16x8_narrow_i32x4(values[j + 2], values[j + 3]);
        wasm_v128_store(qs + 4 * j, wasm_i8x16_narrow_i16x8(low, high));
    }
    *sum = horizontal_sum(total);
    return max / 127.0f;
}

void quantize_row_q8_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    assert(k % QK8_0 == 0);
    block_q8_0 * blocks = y;
    for (int64_t i = 0; i < k / QK8_0; i++) {
        int32_t     sum;
        const float d = quantize_block(x + i * QK8_0, blocks[i].qs, &sum);
        blocks[i].d   = GGML_CPU_FP32_TO_FP16(d);
    }
}

void quantize_row_q8_1(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    assert(k % QK8_1 == 0);
    block_q8_1 * blocks = y;
    for (int64_t i = 0; i < k / QK8_1; i++) {
        int32_t     sum;
        const float d = quantize_block(x + i * QK8_1, blocks[i].qs, &sum);
        blocks[i].d   = GGML_CPU_FP32_TO_FP16(d);
        blocks[i].s   = GGML_CPU_FP32_TO_FP16(d * (float) sum);
    }
}

// The value of largest magnitude becomes -127; of two such values the positive one. That only turns the sign of all: ggml takes
// the first of them.
static inline float largest_of(const float * x) {
    v128_t high = wasm_v128_load(x), low = high;
    for (int j = 4; j < QK_K; j += 4) {
        const v128_t v = wasm_v128_load(x + j);
        high           = wasm_f32x4_pmax(high, v);
        low            = wasm_f32x4_pmin(low, v);
    }
    const float max = horizontal_max(high), least = -horizontal_max(wasm_f32x4_neg(low));
    return -least > max ? least : max;
}

// 16 values; returns their sum.
static inline int32_t quantize_16(const float * x, int8_t * qs, v128_t factor) {
    v128_t values[4], total = wasm_i32x4_splat(0);
    for (int j = 0; j < 4; j++) {
        values[j] = wasm_i32x4_relaxed_trunc_f32x4(wasm_f32x4_nearest(wasm_f32x4_mul(wasm_v128_load(x + 4 * j), factor)));
        total     = wasm_i32x4_add(total, values[j]);
    }
    const v128_t low  = wasm_i16x8_narrow_i32x4(values[0], values[1]);
    const v128_t high = wasm_i16x8_narrow_i32x4(values[2], values[3]);
    wasm_v128_store(qs, wasm_i8x16_narrow_i16x8(low, high));
    return horizontal_sum(total);
}

void quantize_row_q8_K(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_K == 0);
    block_q8_K * blocks = y;
    for (int64_t i = 0; i < k / QK_K; i++) {
        block_q8_K * block = blocks + i;
        const float  max   = largest_of(x + i * QK_K);
        const float  scale = max != 0.0f ? -127.0f / max : 0.0f;
        for (int j = 0; j < QK_K / 16; j++) {
            block->bsums[j] = (int16_t) quantize_16(x + i * QK_K + 16 * j, block->qs + 16 * j, wasm_f32x4_splat(scale));
        }
        block->d = max != 0.0f ? 1.0f / scale : 0.0f;
    }
}
