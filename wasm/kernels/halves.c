// Rows of f16 and bf16 to f32 and back, bit for bit as ggml converts one value after another, eight at a time and without its
// table of 65536 floats. ggml rounds with them the activations that f16 and bf16 weights are multiplied with and what is
// written to a cache of that type, and reads with them what is taken from a table of embeddings.
#include "f16.h"

#include "ggml-cpu.h"

#include <string.h>

typedef struct {
    v128_t low, high;
} floats;

static inline v128_t is_not_finite(v128_t placed) {
    const v128_t exponent = wasm_i32x4_splat(0x1f << 23);
    return wasm_i32x4_eq(wasm_v128_and(placed, exponent), exponent);
}

// The upper half of every 32-bit lane, infinities and NaN too.
static inline v128_t any_f16_to_f32(v128_t lanes) {
    const v128_t placed = wasm_v128_and(wasm_i32x4_shr(lanes, 3), wasm_i32x4_splat((int32_t) 0x8fffe000));
    const v128_t finite = wasm_f32x4_mul(placed, wasm_f32x4_splat(0x1p112f));
    return wasm_v128_or(finite, wasm_v128_and(is_not_finite(placed), wasm_i32x4_splat(0xff << 23)));
}

// Eight halves, each as the upper one of 32 bits.
static inline floats spread(v128_t halves) {
    const v128_t zero = wasm_i32x4_splat(0);
    return (floats) {wasm_i16x8_shuffle(zero, halves, 0, 8, 1, 9, 2, 10, 3, 11),
                     wasm_i16x8_shuffle(zero, halves, 4, 12, 5, 13, 6, 14, 7, 15)};
}

static inline floats from_f16(v128_t halves) {
    const floats lanes = spread(halves);
    return (floats) {any_f16_to_f32(lanes.low), any_f16_to_f32(lanes.high)};
}

static inline v128_t to_f16(floats f) {
    return wasm_u16x8_narrow_i32x4(f32_to_f16(f.low), f32_to_f16(f.high));
}

// Rounded to nearest even, NaN made quiet; in the lower halves.
static inline v128_t f32_to_bf16(v128_t f) {
    const v128_t upper   = wasm_u32x4_shr(f, 16);
    const v128_t is_odd  = wasm_v128_and(upper, wasm_i32x4_splat(1));
    const v128_t rounded = wasm_u32x4_shr(wasm_i32x4_add(f, wasm_i32x4_add(is_odd, wasm_i32x4_splat(0x7fff))), 16);
    const v128_t is_nan  = wasm_f32x4_ne(f, f);
    return wasm_v128_bitselect(wasm_v128_or(upper, wasm_i32x4_splat(64)), rounded, is_nan);
}

static inline v128_t to_bf16(floats f) {
    return wasm_u16x8_narrow_i32x4(f32_to_bf16(f.low), f32_to_bf16(f.high));
}

static inline floats load_floats(const float * x) {
    return (floats) {wasm_v128_load(x), wasm_v128_load(x + 4)};
}

static inline void store_floats(float * y, floats f) {
    wasm_v128_store(y, f.low);
    wasm_v128_store(y + 4, f.high);
}

// The loops over a row: whole groups of eight, then a group filled up.
#define FROM_HALVES(convert)                                     \
    int64_t i = 0;                                               \
    for (; i + 8 <= n; i += 8) {                                 \
        store_floats(y + i, convert(wasm_v128_load(x + i)));     \
    }                                                            \
    if (i < n) {                                                 \
        uint16_t halves[8] = {0};                                \
        float    values[8];                                      \
        memcpy(halves, x + i, (size_t) (n - i) * sizeof(*x));    \
        store_floats(values, convert(wasm_v128_load(halves)));   \
        memcpy(y + i, values, (size_t) (n - i) * sizeof(float)); \
    }

#define TO_HALVES(convert)                                        \
    int64_t i = 0;                                                \
    for (; i + 8 <= n; i += 8) {                                  \
        wasm_v128_store(y + i, convert(load_floats(x + i)));      \
    }                                                             \
    if (i < n) {                                                  \
        float    values[8] = {0};                                 \
        uint16_t halves[8];                                       \
        memcpy(values, x + i, (size_t) (n - i) * sizeof(float));  \
        wasm_v128_store(halves, convert(load_floats(values)));    \
        memcpy(y + i, halves, (size_t) (n - i) * sizeof(*y));     \
    }

void ggml_cpu_fp16_to_fp32(const ggml_fp16_t * x, float * y, int64_t n) {
    FROM_HALVES(from_f16)
}

void ggml_cpu_bf16_to_fp32(const ggml_bf16_t * x, float * y, int64_t n) {
    FROM_HALVES(spread)
}

void ggml_cpu_fp32_to_fp16(const float * x, ggml_fp16_t * y, int64_t n) {
    TO_HALVES(to_f16)
}

void ggml_cpu_fp32_to_bf16(const float * x, ggml_bf16_t * y, int64_t n) {
    TO_HALVES(to_bf16)
}
