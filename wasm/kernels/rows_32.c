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

// 16-bit or 32-bit sums of one block's products. `fifth` are the fifth bits as dot_five_bits wants them, `half` which half.
typedef v128_t (*block_dot)(const uint8_t * x, const activations * y, v128_t fifth, int half);

typedef enum { PLAIN, BIAS_8, BIAS_12, BIAS_16, SIGNED } activation_kind;

// What a block begins with.
typedef enum { SCALE, SCALE_AND_MIN, EXPONENT } head_kind;

// What dot returns: 16-bit sums of four products each that still fit when 16 products are added, or 8, or 32-bit sums.
typedef enum { SUMS_16, SUMS_16_OF_8, SUMS_32 } sum_kind;

// All there is to know about a format.
typedef struct {
    size_t          block_bytes;
    activation_kind activations;
    head_kind       head;
    sum_kind        sums;
    bool            has_fifth_bit;
    block_dot       dot;
} format_32;

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

ALWAYS_INLINE v128_t dot_q4_0(const uint8_t * x, const activations * y, v128_t unused_fifth, int unused_half) {
    const v128_t bytes = wasm_v128_load(x + offsetof(block_q4_0, qs));
    const v128_t sums  = dot_unsigned(low_nibbles(bytes), high_nibbles(bytes), y);
    return wasm_i16x8_sub(sums, y->offset);
}

ALWAYS_INLINE v128_t dot_q4_1(const uint8_t * x, const activations * y, v128_t unused_fifth, int unused_half) {
    const v128_t bytes = wasm_v128_load(x + offsetof(block_q4_1, qs));
    return dot_unsigned(low_nibbles(bytes), high_nibbles(bytes), y);
}

// Each half of `fifth` has 32 bits and the same shifted left by four: every bit is in the upper half of some byte, worth 16 and
// more, and the smaller of that and 16 is what it adds to the code.
#define FIFTH_BITS(fifth, q, above)                                                                                        \
    wasm_u8x16_min(wasm_v128_and(wasm_i8x16_shuffle(fifth, fifth, above, above, above, above, q, q, q, q, above + 1,       \
                                                    above + 1, above + 1, above + 1, q + 1, q + 1, q + 1, q + 1),          \
                                 wasm_i8x16_make(16, 32, 64, -128, 16, 32, 64, -128, 16, 32, 64, -128, 16, 32, 64, -128)), \
                   wasm_i8x16_splat(16))

ALWAYS_INLINE v128_t dot_five_bits(const uint8_t * qs, const activations * y, v128_t fifth, int half) {
    const v128_t bytes = wasm_v128_load(qs);
    const v128_t low   = half ? FIFTH_BITS(fifth, 8, 12) : FIFTH_BITS(fifth, 0, 4);
    const v128_t high  = half ? FIFTH_BITS(fifth, 10, 14) : FIFTH_BITS(fifth, 2, 6);
    return dot_unsigned(wasm_v128_or(low_nibbles(bytes), low), wasm_v128_or(high_nibbles(bytes), high), y);
}

ALWAYS_INLINE v128_t dot_q5_0(const uint8_t * x, const activations * y, v128_t fifth, int half) {
    return wasm_i16x8_sub(dot_five_bits(x + offsetof(block_q5_0, qs), y, fifth, half), y->offset);
}

ALWAYS_INLINE v128_t dot_q5_1(const uint8_t * x, const activations * y, v128_t fifth, int half) {
    return dot_five_bits(x + offsetof(block_q5_1, qs), y, fifth, half);
}

ALWAYS_INLINE v128_t dot_q8_0(const uint8_t * x, const activations * y, v128_t unused_fifth, int unused_half) {
    const uint8_t * qs = x + offsetof(block_q8_0, qs);
    return dot_signed(wasm_v128_load(qs), wasm_v128_load(qs + 16), y);
}

ALWAYS_INLINE v128_t dot_iq4_nl(const uint8_t * x, const activations * y, v128_t unused_fifth, int unused_half) {
    const v128_t table = wasm_v128_load(kvalues_iq4nl);
    const v128_t bytes = wasm_v128_load(x + offsetof(block_iq4_nl, qs));
    return dot_signed(wasm_i8x16_relaxed_swizzle(table, low_nibbles(bytes)),
                      wasm_i8x16_relaxed_swizzle(table, high_nibbles(bytes)), y);
}

// The table's values are -12 to 12.
ALWAYS_INLINE v128_t dot_mxfp4(const uint8_t * x, const activations * y, v128_t unused_fifth, int unused_half) {
    const v128_t table = wasm_i8x16_add(wasm_v128_load(kvalues_mxfp4), wasm_i8x16_splat(12));
    const v128_t bytes = wasm_v128_load(x + offsetof(block_mxfp4, qs));
    const v128_t sums  = dot_unsigned(wasm_i8x16_relaxed_swizzle(table, low_nibbles(bytes)),
                                      wasm_i8x16_relaxed_swizzle(table, high_nibbles(bytes)), y);
    return wasm_i16x8_sub(sums, y->offset);
}

ALWAYS_INLINE v128_t scale_of(v128_t head, head_kind kind) {
    return kind == EXPONENT ? e8m0_to_f32(head) : f16_low_to_f32(head);
}

ALWAYS_INLINE v128_t add_even_odd_16(v128_t a, v128_t b) {
    return wasm_i16x8_add(wasm_i32x4_shuffle(a, b, 0, 2, 4, 6), wasm_i32x4_shuffle(a, b, 1, 3, 5, 7));
}

// The sums of each, one in each lane.
ALWAYS_INLINE v128_t totals(const v128_t sums[N_ROWS], sum_kind kind) {
    if (kind == SUMS_32) {
        return sum_each(sums[0], sums[1], sums[2], sums[3]);
    }
    v128_t a = add_even_odd_16(sums[0], sums[1]), b = add_even_odd_16(sums[2], sums[3]);
    if (kind == SUMS_16) {
        return wasm_i32x4_extadd_pairwise_i16x8(add_even_odd_16(a, b));
    }
    a = wasm_i32x4_extadd_pairwise_i16x8(a);
    b = wasm_i32x4_extadd_pairwise_i16x8(b);
    return wasm_i32x4_add(wasm_i32x4_shuffle(a, b, 0, 2, 4, 6), wasm_i32x4_shuffle(a, b, 1, 3, 5, 7));
}

// With SCALE_AND_MIN the weights have an offset m, and the activations are q8_1.
ALWAYS_INLINE size_t y_bytes_of(format_32 format) {
    return format.head == SCALE_AND_MIN ? sizeof(block_q8_1) : sizeof(block_q8_0);
}

ALWAYS_INLINE size_t y_qs_of(format_32 format) {
    return format.head == SCALE_AND_MIN ? offsetof(block_q8_1, qs) : offsetof(block_q8_0, qs);
}

// What four blocks x[r] give with the activations y[r], a block a lane, added to acc. `scales` are the activations' heads.
ALWAYS_INLINE v128_t add_4_blocks(v128_t acc, const uint8_t * const x[N_ROWS], const uint8_t * const y[N_ROWS], v128_t scales,
                                  format_32 format) {
    const v128_t r0 = wasm_v128_load(x[0]), r1 = wasm_v128_load(x[1]), r2 = wasm_v128_load(x[2]), r3 = wasm_v128_load(x[3]);
    const v128_t a = wasm_i32x4_shuffle(r0, r1, 0, 4, 1, 5), b = wasm_i32x4_shuffle(r2, r3, 0, 4, 1, 5);
    const v128_t head = wasm_i64x2_shuffle(a, b, 0, 2);
    v128_t       fifth[2] = {head, head}, sums[N_ROWS];
    if (format.has_fifth_bit) {
        const v128_t second = wasm_i64x2_shuffle(a, b, 1, 3);
        const v128_t across = wasm_v128_or(wasm_u32x4_shr(head, 16), wasm_i32x4_shl(second, 16));
        const v128_t bits   = format.head == SCALE_AND_MIN ? second : across;
        const v128_t above  = wasm_i32x4_shl(bits, 4);
        fifth[0] = wasm_i32x4_shuffle(bits, above, 0, 4, 1, 5);
        fifth[1] = wasm_i32x4_shuffle(bits, above, 2, 6, 3, 7);
    }
    for (int r = 0; r < N_ROWS; r++) {
        const activations a = read_activations(y[r] + y_qs_of(format), format.activations);
        sums[r] = format.dot(x[r], &a, fifth[r / 2], r % 2);
        sums[r] = calculated(sums[r], x[0]);
    }
    const v128_t products = wasm_f32x4_convert_i32x4(totals(sums, format.sums));
    acc = wasm_f32x4_relaxed_madd(products, wasm_f32x4_mul(scale_of(head, format.head), f16_low_to_f32(scales)), acc);
    return format.head == SCALE_AND_MIN ? wasm_f32x4_relaxed_madd(f16_high_to_f32(head), f16_high_to_f32(scales), acc) : acc;
}

ALWAYS_INLINE void rows_32(int64_t n, const uint8_t * const start[N_ROWS], const uint8_t * y, float * out,
                           format_32 format) {
    const uint8_t * x[N_ROWS] = {start[0], start[1], start[2], start[3]};
    v128_t          acc       = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n; i++) {
        const uint8_t * const same[N_ROWS] = {y, y, y, y};
        acc = add_4_blocks(acc, x, same, wasm_v128_load32_splat(y), format);
        for (int r = 0; r < N_ROWS; r++) {
            x[r] += format.block_bytes;
            OPAQUE(x[r]);
        }
        y += y_bytes_of(format);
        OPAQUE(y);
    }
    wasm_v128_store(out, acc);
}

// What four consecutive blocks of one row add to the sums: a lane is a block.
ALWAYS_INLINE v128_t dot_4_blocks(const uint8_t * x, const uint8_t * y, v128_t acc, format_32 format) {
    const uint8_t * xs[N_ROWS];
    const uint8_t * ys[N_ROWS];
    for (int i = 0; i < N_ROWS; i++) {
        xs[i] = x + (size_t) i * format.block_bytes;
        ys[i] = y + (size_t) i * y_bytes_of(format);
    }
    return add_4_blocks(acc, xs, ys, load_each(ys, 0), format);
}

ALWAYS_INLINE float dot_32(int64_t n, const uint8_t * x, const uint8_t * y, format_32 format) {
    const size_t n_rest = (size_t) (n % N_ROWS);
    v128_t       acc    = wasm_f32x4_splat(0.0f);
    for (int64_t i = 0; i < n / N_ROWS; i++) {
        acc = dot_4_blocks(x, y, acc, format);
        x += N_ROWS * format.block_bytes;
        y += N_ROWS * y_bytes_of(format);
        OPAQUE(x);
        OPAQUE(y);
    }
    if (n_rest) {
        // blocks of zeros add nothing
        uint8_t last_x[N_ROWS * sizeof(block_q8_0)] = {0}, last_y[N_ROWS * sizeof(block_q8_1)] = {0};
        memcpy(last_x, x, n_rest * format.block_bytes);
        memcpy(last_y, y, n_rest * y_bytes_of(format));
        acc = dot_4_blocks(last_x, last_y, acc, format);
    }
    return sum_of_lanes(acc);
}

// The kernel of four rows of one format, and the dot product of one.
#define KERNELS_32(type, ...)                                                                                              \
    static const format_32 FORMAT_##type = {sizeof(block_##type), __VA_ARGS__, dot_##type};                                \
    static __attribute__((noinline)) float dot_row_##type(int64_t n, const uint8_t * x, const uint8_t * y) {               \
        return dot_32(n, x, y, FORMAT_##type);                                                                             \
    }                                                                                                                      \
    void pw_rows_##type(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out) {                      \
        rows_32(n, x, y, out, FORMAT_##type);                                                                              \
    }

#define VEC_DOT_32(type, y_type)                                                                                           \
    VEC_DOT(ggml_vec_dot_##type##_##y_type) {                                                                              \
        s[0] = dot_row_##type(n / QK8_0, x, y);                                                                            \
    }

KERNELS_32(q4_0, BIAS_8, SCALE, SUMS_16, false)
KERNELS_32(q4_1, PLAIN, SCALE_AND_MIN, SUMS_16, false)
KERNELS_32(q5_0, BIAS_16, SCALE, SUMS_16, true)
KERNELS_32(q5_1, PLAIN, SCALE_AND_MIN, SUMS_16_OF_8, true)
KERNELS_32(q8_0, SIGNED, SCALE, SUMS_32, false)
KERNELS_32(iq4_nl, SIGNED, SCALE, SUMS_32, false)
KERNELS_32(mxfp4, BIAS_12, EXPONENT, SUMS_16, false)

// ggml's dot products. Those of q5_0 and q8_0 are upstream's.
VEC_DOT_32(q4_0, q8_0)
VEC_DOT_32(q4_1, q8_1)
VEC_DOT_32(q5_1, q8_1)
VEC_DOT_32(iq4_nl, q8_0)
VEC_DOT_32(mxfp4, q8_0)
