// Blocks of 32 weights (q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, mxfp4) against q8_0 or q8_1 activations.
//
//   q4_0  half d;                    qs[16]   w[i] = d * (qs[i] & 15 - 8), w[16 + i] = d * (qs[i] >> 4 - 8)
//   q4_1  half d, half m;            qs[16]   w    = d * nibble + m
//   q5_0  half d;         u32 qh;    qs[16]   bit i of qh is the fifth bit of w[i]; w = d * (code - 16)
//   q5_1  half d, half m; u32 qh;    qs[16]   w = d * code + m
//   q8_0  half d;                    qs[32]   w = d * qs[i], signed
//   iq4_nl half d;                   qs[16]   w = d * table[nibble], signed
//   mxfp4 u8 e;                      qs[16]   w = 2^(e - 128) * table[nibble], signed
//   y: q8_0 {half d; int8 qs[32]} or q8_1 {half d; half s; int8 qs[32]}, s = d * sum(qs)
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-quants.h"
#include "codes.h"

#include <string.h>

// One block of activations as the formats want it.
typedef struct {
    v128_t q[2];         // 32 values
    v128_t magnitude[2]; // ... without sign, for signed weights
    v128_t sign[2];      // all bits set where q is negative
    v128_t offset;       // what the weights' bias adds, to be taken off the 16-bit sums
} activations;

// 16-bit or 32-bit sums of one row's products.
typedef v128_t (*block_dot)(const uint8_t * x, const activations * y);

typedef enum { PLAIN, BIAS_8, BIAS_12, BIAS_16, SIGNED } activation_kind;

// What a block begins with.
typedef enum { SCALE, SCALE_AND_MIN, EXPONENT } head_kind;

ALWAYS_INLINE activations read_activations(const uint8_t * qs, activation_kind kind) {
    activations y = {.q = {wasm_v128_load(qs), wasm_v128_load(qs + 16)}};
    if (kind == BIAS_8 || kind == BIAS_12 || kind == BIAS_16) {
        const v128_t pairs = wasm_i16x8_add(wasm_i16x8_extadd_pairwise_i8x16(y.q[0]), wasm_i16x8_extadd_pairwise_i8x16(y.q[1]));
        y.offset = kind == BIAS_12 ? wasm_i16x8_mul(pairs, wasm_i16x8_splat(12)) : wasm_i16x8_shl(pairs, kind == BIAS_8 ? 3 : 4);
    }
    if (kind == SIGNED) {
        for (int i = 0; i < 2; i++) {
            y.sign[i]      = signs(y.q[i]);
            y.magnitude[i] = wasm_i8x16_abs(y.q[i]);
        }
    }
    return y;
}

ALWAYS_INLINE v128_t dot_unsigned(v128_t low, v128_t high, const activations * y) {
    return wasm_i16x8_add(dot_codes(y->q[0], low), dot_codes(y->q[1], high));
}

// The activation's sign goes over to the weight: |y| is the operand of 7 bits. A weight of -128, which no quantizer writes,
// becomes 127 where the sign turns.
ALWAYS_INLINE v128_t dot_signed(v128_t low, v128_t high, const activations * y) {
    const v128_t a = wasm_i8x16_sub_sat(wasm_v128_xor(low, y->sign[0]), y->sign[0]);
    const v128_t b = wasm_i8x16_sub_sat(wasm_v128_xor(high, y->sign[1]), y->sign[1]);
    // two products of 127 * 127 fill 16 bits: widen before adding
    return wasm_i32x4_add(wasm_i32x4_extadd_pairwise_i16x8(dot_codes(a, y->magnitude[0])),
                          wasm_i32x4_extadd_pairwise_i16x8(dot_codes(b, y->magnitude[1])));
}

ALWAYS_INLINE v128_t dot_q4_0(const uint8_t * x, const activations * y) {
    const v128_t bytes = wasm_v128_load(x + offsetof(block_q4_0, qs));
    const v128_t sums  = dot_unsigned(low_nibbles(bytes), high_nibbles(bytes), y);
    return wasm_i32x4_extadd_pairwise_i16x8(wasm_i16x8_sub(sums, y->offset));
}

ALWAYS_INLINE v128_t dot_q4_1(const uint8_t * x, const activations * y) {
    const v128_t bytes = wasm_v128_load(x + offsetof(block_q4_1, qs));
    return wasm_i32x4_extadd_pairwise_i16x8(dot_unsigned(low_nibbles(bytes), high_nibbles(bytes), y));
}

ALWAYS_INLINE v128_t dot_five_bits(const uint8_t * qs, const uint8_t * qh, const activations * y) {
    const v128_t bytes = wasm_v128_load(qs), bits = wasm_v128_load32_zero(qh);
    const v128_t low   = wasm_v128_or(low_nibbles(bytes), fifth_bits(bits, 0));
    const v128_t high  = wasm_v128_or(high_nibbles(bytes), fifth_bits(bits, 16));
    return dot_unsigned(low, high, y);
}

ALWAYS_INLINE v128_t dot_q5_0(const uint8_t * x, const activations * y) {
    const v128_t sums = dot_five_bits(x + offsetof(block_q5_0, qs), x + offsetof(block_q5_0, qh), y);
    return wasm_i32x4_extadd_pairwise_i16x8(wasm_i16x8_sub(sums, y->offset));
}

ALWAYS_INLINE v128_t dot_q5_1(const uint8_t * x, const activations * y) {
    return wasm_i32x4_extadd_pairwise_i16x8(
        dot_five_bits(x + offsetof(block_q5_1, qs), x + offsetof(block_q5_1, qh), y));
}

ALWAYS_INLINE v128_t dot_q8_0(const uint8_t * x, const activations * y) {
    const uint8_t * qs = x + offsetof(block_q8_0, qs);
    return dot_signed(wasm_v128_load(qs), wasm_v128_load(qs + 16), y);
}

ALWAYS_INLINE v128_t dot_iq4_nl(const uint8_t * x, const activations * y) {
    const v128_t table = wasm_v128_load(kvalues_iq4nl);
    const v128_t bytes = wasm_v128_load(x + offsetof(block_iq4_nl, qs));
    return dot_signed(wasm_i8x16_relaxed_swizzle(table, low_nibbles(bytes)),
                      wasm_i8x16_relaxed_swizzle(table, high_nibbles(bytes)), y);
}

// The table's values are -12 to 12.
ALWAYS_INLINE v128_t dot_mxfp4(const uint8_t * x, const activations * y) {
    const v128_t table = wasm_i8x16_add(wasm_v128_load(kvalues_mxfp4), wasm_i8x16_splat(12));
    const v128_t bytes = wasm_v128_load(x + offsetof(block_mxfp4, qs));
    const v128_t sums  = dot_unsigned(wasm_i8x16_relaxed_swizzle(table, low_nibbles(bytes)),
                                      wasm_i8x16_relaxed_swizzle(table, high_nibbles(bytes)), y);
    return wasm_i32x4_extadd_pairwise_i16x8(wasm_i16x8_sub(sums, y->offset));
}

ALWAYS_INLINE v128_t scale_of(v128_t head, head_kind kind) {
    return kind == EXPONENT ? e8m0_to_f32(head) : f16_low_to_f32(head);
}

// With SCALE_AND_MIN the weights have an offset m, and the activations are q8_1.
ALWAYS_INLINE void rows_32(int64_t n, const uint8_t * const start[N_ROWS + 1], const uint8_t * y, float * out, size_t block_bytes,
                           activation_kind kind, head_kind head_is, block_dot dot) {
    const bool      has_min   = head_is == SCALE_AND_MIN;
    const size_t    y_bytes   = has_min ? sizeof(block_q8_1) : sizeof(block_q8_0);
    const size_t    y_qs      = has_min ? offsetof(block_q8_1, qs) : offsetof(block_q8_0, qs);
    const uint8_t * x[N_ROWS] = {start[0], start[1], start[2], start[3]};
    const uint8_t * next      = start[N_ROWS];
    v128_t          acc       = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++, y += y_bytes) {
        const activations a    = read_activations(y + y_qs, kind);
        const v128_t      sums = wasm_f32x4_convert_i32x4(sum_each(dot(x[0], &a), dot(x[1], &a), dot(x[2], &a), dot(x[3], &a)));
        const v128_t      head = load_each(x, 0);
        const v128_t      scales = wasm_v128_load32_splat(y);
        acc = wasm_f32x4_relaxed_madd(sums, wasm_f32x4_mul(scale_of(head, head_is), f16_low_to_f32(scales)), acc);
        if (has_min) {
            acc = wasm_f32x4_relaxed_madd(f16_high_to_f32(head), f16_high_to_f32(scales), acc);
        }
        next = touch(next, N_ROWS * block_bytes);
        for (int r = 0; r < N_ROWS; r++) {
            x[r] += block_bytes;
        }
    }
    wasm_v128_store(out, acc);
}

void pw_rows_q4_0(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_32(n, x, y, out, sizeof(block_q4_0), BIAS_8, SCALE, dot_q4_0);
}

void pw_rows_q4_1(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_32(n, x, y, out, sizeof(block_q4_1), PLAIN, SCALE_AND_MIN, dot_q4_1);
}

void pw_rows_q5_0(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_32(n, x, y, out, sizeof(block_q5_0), BIAS_16, SCALE, dot_q5_0);
}

void pw_rows_q5_1(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_32(n, x, y, out, sizeof(block_q5_1), PLAIN, SCALE_AND_MIN, dot_q5_1);
}

void pw_rows_q8_0(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_32(n, x, y, out, sizeof(block_q8_0), SIGNED, SCALE, dot_q8_0);
}

void pw_rows_iq4_nl(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_32(n, x, y, out, sizeof(block_iq4_nl), SIGNED, SCALE, dot_iq4_nl);
}

void pw_rows_mxfp4(int64_t n, const uint8_t * const x[N_ROWS + 1], const uint8_t * y, float * out) {
    rows_32(n, x, y, out, sizeof(block_mxfp4), BIAS_12, EXPONENT, dot_mxfp4);
}

// --- ggml's dot products of one row: a lane is a block. Those of q5_0 and q8_0 are upstream's, which are faster.

#define N_LANES 4

// What four consecutive blocks add to the sums.
ALWAYS_INLINE v128_t dot_4_blocks(const uint8_t * x, const uint8_t * y, v128_t acc, size_t block_bytes, activation_kind kind,
                                  head_kind head_is, block_dot dot) {
    const bool      has_min = head_is == SCALE_AND_MIN;
    const size_t    y_bytes = has_min ? sizeof(block_q8_1) : sizeof(block_q8_0);
    const size_t    y_qs    = has_min ? offsetof(block_q8_1, qs) : offsetof(block_q8_0, qs);
    const uint8_t * xs[N_LANES];
    const uint8_t * ys[N_LANES];
    v128_t          sums[N_LANES];
    for (int i = 0; i < N_LANES; i++) {
        xs[i]               = x + (size_t) i * block_bytes;
        ys[i]               = y + (size_t) i * y_bytes;
        const activations a = read_activations(ys[i] + y_qs, kind);
        sums[i]             = dot(xs[i], &a);
    }
    const v128_t head = load_each(xs, 0), scales = load_each(ys, 0);
    const v128_t products = wasm_f32x4_convert_i32x4(sum_each(sums[0], sums[1], sums[2], sums[3]));
    acc = wasm_f32x4_relaxed_madd(products, wasm_f32x4_mul(scale_of(head, head_is), f16_low_to_f32(scales)), acc);
    return has_min ? wasm_f32x4_relaxed_madd(f16_high_to_f32(head), f16_high_to_f32(scales), acc) : acc;
}

ALWAYS_INLINE void dot_32(int n_values, float * out, const uint8_t * x, const uint8_t * y, size_t block_bytes, activation_kind kind,
                          head_kind head_is, block_dot dot) {
    const size_t y_bytes = head_is == SCALE_AND_MIN ? sizeof(block_q8_1) : sizeof(block_q8_0);
    const int    n       = n_values / QK8_0;
    const size_t n_rest  = (size_t) (n % N_LANES);
    v128_t       acc     = wasm_f32x4_splat(0.0f);
    for (int i = 0; i < n / N_LANES; i++, x += N_LANES * block_bytes, y += N_LANES * y_bytes) {
        acc = dot_4_blocks(x, y, acc, block_bytes, kind, head_is, dot);
    }
    if (n_rest) {
        // blocks of zeros add nothing
        uint8_t last_x[N_LANES * sizeof(block_q8_0)] = {0}, last_y[N_LANES * sizeof(block_q8_1)] = {0};
        memcpy(last_x, x, n_rest * block_bytes);
        memcpy(last_y, y, n_rest * y_bytes);
        acc = dot_4_blocks(last_x, last_y, acc, block_bytes, kind, head_is, dot);
    }
    out[0] = sum_of_lanes(acc);
}

VEC_DOT(ggml_vec_dot_q4_0_q8_0) {
    dot_32(n, s, x, y, sizeof(block_q4_0), BIAS_8, SCALE, dot_q4_0);
}

VEC_DOT(ggml_vec_dot_q4_1_q8_1) {
    dot_32(n, s, x, y, sizeof(block_q4_1), PLAIN, SCALE_AND_MIN, dot_q4_1);
}

VEC_DOT(ggml_vec_dot_q5_1_q8_1) {
    dot_32(n, s, x, y, sizeof(block_q5_1), PLAIN, SCALE_AND_MIN, dot_q5_1);
}

VEC_DOT(ggml_vec_dot_iq4_nl_q8_0) {
    dot_32(n, s, x, y, sizeof(block_iq4_nl), SIGNED, SCALE, dot_iq4_nl);
}

VEC_DOT(ggml_vec_dot_mxfp4_q8_0) {
    dot_32(n, s, x, y, sizeof(block_mxfp4), BIAS_12, EXPONENT, dot_mxfp4);
}
