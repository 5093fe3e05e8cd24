// Weights and rounded activations to f32, sixteen at a time, for the host's BLAS. Layouts are in rows_32.c and rows_256.c.
//
// Scale times code is exact in f32 for every format but q6_K, and is rounded once there; a minimum is added with one more
// rounding. ggml's to_float does the same, fused or not, so the results are equal to the last bit.
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "blas.h"
#include "codes.h"
#include "panels.h"
#include "strips.h"

#include <string.h>

ALWAYS_INLINE v128_t load_f16_splat(const void * p) {
    return f16_high_to_f32(wasm_v128_load16_splat(p));
}

#define ZERO -128  // what gives a byte of zeros
#define TOP_BYTES(first) \
    wasm_i8x16_make(ZERO, ZERO, ZERO, first, ZERO, ZERO, ZERO, first + 1, ZERO, ZERO, ZERO, first + 2, ZERO, ZERO, ZERO, first + 3)
#define TOP_UNIT 0x1p-24f

// Signed bytes `first` to `first + 3`, each 2^24 times itself: one instruction moves them to the top, where their sign is.
ALWAYS_INLINE v128_t top_bytes(v128_t bytes, v128_t which) {
    return wasm_f32x4_convert_i32x4(wasm_i8x16_relaxed_swizzle(bytes, which));
}

// out[0..15] = scale * bytes + min; bytes are signed.
ALWAYS_INLINE void store_16(float * out, v128_t bytes, v128_t scale, v128_t min, bool has_min) {
    const v128_t unit     = wasm_f32x4_mul(scale, wasm_f32x4_splat(TOP_UNIT));
    const v128_t which[4] = {TOP_BYTES(0), TOP_BYTES(4), TOP_BYTES(8), TOP_BYTES(12)};
    for (int i = 0; i < 4; i++) {
        const v128_t codes = top_bytes(bytes, which[i]);
        wasm_v128_store(out + 4 * i, has_min ? wasm_f32x4_relaxed_madd(codes, unit, min) : wasm_f32x4_mul(codes, unit));
    }
}

static const v128_t no_min;

ALWAYS_INLINE v128_t minus(v128_t bytes, int bias) {
    return wasm_i8x16_sub(bytes, wasm_i8x16_splat((int8_t) bias));
}

static void expand_f16(const void * row, float * out, int64_t n) {
    const uint16_t * x = row;
    int64_t          i = 0;
    for (; i + 8 <= n; i += 8) {
        v128_t low, high;
        f16x8_load(x + i, &low, &high);
        wasm_v128_store(out + i, low);
        wasm_v128_store(out + i + 4, high);
    }
    for (; i < n; i++) {
        out[i] = wasm_f32x4_extract_lane(load_f16_splat(x + i), 0);
    }
}

static void expand_bf16(const void * row, float * out, int64_t n) {
    const uint16_t * x = row;
    int64_t          i = 0;
    for (; i + 8 <= n; i += 8) {
        const v128_t halves = wasm_v128_load(x + i), zero = wasm_i32x4_splat(0);
        wasm_v128_store(out + i, wasm_i16x8_shuffle(zero, halves, 0, 8, 1, 9, 2, 10, 3, 11));
        wasm_v128_store(out + i + 4, wasm_i16x8_shuffle(zero, halves, 4, 12, 5, 13, 6, 14, 7, 15));
    }
    for (; i < n; i++) {
        const uint32_t bits = (uint32_t) x[i] << 16;
        memcpy(out + i, &bits, sizeof(bits));
    }
}

static void expand_q4_0(const void * row, float * out, int64_t n) {
    const block_q4_0 * x = row;
    for (int64_t i = 0; i < n; i += QK4_0, x++) {
        const v128_t d = load_f16_splat(&x->d), bytes = wasm_v128_load(x->qs);
        store_16(out + i, minus(low_nibbles(bytes), 8), d, no_min, false);
        store_16(out + i + 16, minus(high_nibbles(bytes), 8), d, no_min, false);
    }
}

static void expand_q4_1(const void * row, float * out, int64_t n) {
    const block_q4_1 * x = row;
    for (int64_t i = 0; i < n; i += QK4_1, x++) {
        const v128_t d = load_f16_splat(&x->d), min = load_f16_splat(&x->m), bytes = wasm_v128_load(x->qs);
        store_16(out + i, low_nibbles(bytes), d, min, true);
        store_16(out + i + 16, high_nibbles(bytes), d, min, true);
    }
}

static void expand_q5_0(const void * row, float * out, int64_t n) {
    const block_q5_0 * x = row;
    for (int64_t i = 0; i < n; i += QK5_0, x++) {
        const v128_t d = load_f16_splat(&x->d), bytes = wasm_v128_load(x->qs), bits = wasm_v128_load32_zero(x->qh);
        store_16(out + i, minus(wasm_v128_or(low_nibbles(bytes), fifth_bits(bits, 0)), 16), d, no_min, false);
        store_16(out + i + 16, minus(wasm_v128_or(high_nibbles(bytes), fifth_bits(bits, 1)), 16), d, no_min, false);
    }
}

static void expand_q5_1(const void * row, float * out, int64_t n) {
    const block_q5_1 * x = row;
    for (int64_t i = 0; i < n; i += QK5_1, x++) {
        const v128_t d = load_f16_splat(&x->d), min = load_f16_splat(&x->m);
        const v128_t bytes = wasm_v128_load(x->qs), bits = wasm_v128_load32_zero(x->qh);
        store_16(out + i, wasm_v128_or(low_nibbles(bytes), fifth_bits(bits, 0)), d, min, true);
        store_16(out + i + 16, wasm_v128_or(high_nibbles(bytes), fifth_bits(bits, 1)), d, min, true);
    }
}

static void expand_q8_0(const void * row, float * out, int64_t n) {
    const block_q8_0 * x = row;
    for (int64_t i = 0; i < n; i += QK8_0, x++) {
        const v128_t d = load_f16_splat(&x->d);
        store_16(out + i, wasm_v128_load(x->qs), d, no_min, false);
        store_16(out + i + 16, wasm_v128_load(x->qs + 16), d, no_min, false);
    }
}

// The two formats that are only activations, which ggml itself never reads back.
static void expand_q8_1(const void * row, float * out, int64_t n) {
    const block_q8_1 * x = row;
    for (int64_t i = 0; i < n; i += QK8_1, x++) {
        const v128_t d = load_f16_splat(&x->d);
        store_16(out + i, wasm_v128_load(x->qs), d, no_min, false);
        store_16(out + i + 16, wasm_v128_load(x->qs + 16), d, no_min, false);
    }
}

static void expand_q8_K(const void * row, float * out, int64_t n) {
    const block_q8_K * x = row;
    for (int64_t i = 0; i < n; i += QK_K, x++) {
        const v128_t d = wasm_v128_load32_splat(&x->d);
        for (int j = 0; j < QK_K; j += 16) {
            store_16(out + i + j, wasm_v128_load(x->qs + j), d, no_min, false);
        }
    }
}

static void expand_iq4_nl(const void * row, float * out, int64_t n) {
    const block_iq4_nl * x      = row;
    const v128_t         values = wasm_v128_load(kvalues_iq4nl);
    for (int64_t i = 0; i < n; i += QK4_NL, x++) {
        const v128_t d = load_f16_splat(&x->d), bytes = wasm_v128_load(x->qs);
        store_16(out + i, wasm_i8x16_relaxed_swizzle(values, low_nibbles(bytes)), d, no_min, false);
        store_16(out + i + 16, wasm_i8x16_relaxed_swizzle(values, high_nibbles(bytes)), d, no_min, false);
    }
}

// d * scale of eight groups of weights, and -dmin * min of each.
ALWAYS_INLINE void scales_and_mins(const block_q4_K * x, float scales[8], float mins[8]) {
    const v128_t d = load_f16_splat(&x->d), dmin = wasm_f32x4_neg(load_f16_splat(&x->dmin));
    v128_t       s, m;
    unpack_scales(x->scales, &s, &m);
    wasm_v128_store(scales, wasm_f32x4_mul(d, wasm_f32x4_convert_i32x4(wasm_u32x4_extend_low_u16x8(s))));
    wasm_v128_store(scales + 4, wasm_f32x4_mul(d, wasm_f32x4_convert_i32x4(wasm_u32x4_extend_high_u16x8(s))));
    wasm_v128_store(mins, wasm_f32x4_mul(dmin, wasm_f32x4_convert_i32x4(wasm_u32x4_extend_low_u16x8(m))));
    wasm_v128_store(mins + 4, wasm_f32x4_mul(dmin, wasm_f32x4_convert_i32x4(wasm_u32x4_extend_high_u16x8(m))));
}

static void expand_q4_K(const void * row, float * out, int64_t n) {
    const block_q4_K * x = row;
    for (int64_t i = 0; i < n; i += QK_K, x++) {
        float scales[8], mins[8];
        scales_and_mins(x, scales, mins);
        for (int j = 0; j < 8; j++) {
            const v128_t d = wasm_v128_load32_splat(scales + j), min = wasm_v128_load32_splat(mins + j);
            for (int half = 0; half < 32; half += 16) {
                const v128_t bytes = wasm_v128_load(x->qs + 32 * (j / 2) + half);
                store_16(out + i + 32 * j + half, j % 2 ? high_nibbles(bytes) : low_nibbles(bytes), d, min, true);
            }
        }
    }
}

static void expand_q5_K(const void * row, float * out, int64_t n) {
    const block_q5_K * x = row;
    for (int64_t i = 0; i < n; i += QK_K, x++) {
        float scales[8], mins[8];
        scales_and_mins((const block_q4_K *) x, scales, mins);  // begins alike
        for (int j = 0; j < 8; j++) {
            const v128_t d = wasm_v128_load32_splat(scales + j), min = wasm_v128_load32_splat(mins + j);
            for (int half = 0; half < 32; half += 16) {
                const v128_t bytes = wasm_v128_load(x->qs + 32 * (j / 2) + half), high = fifth_bit(wasm_v128_load(x->qh + half), j);
                store_16(out + i + 32 * j + half, wasm_v128_or(j % 2 ? high_nibbles(bytes) : low_nibbles(bytes), high), d, min, true);
            }
        }
    }
}

static void expand_q6_K(const void * row, float * out, int64_t n) {
    const block_q6_K * x = row;
    for (int64_t i = 0; i < n; i += QK_K, x++) {
        const v128_t d = load_f16_splat(&x->d);
        for (int part = 0; part < 4; part++) {  // 32 weights of each half from 16 g on, four times 32 apart
            const int h = part / 2, g = part % 2;
            v128_t    codes[4];
            q6_K_codes((const uint8_t *) x, h, g, codes);
            for (int k = 0; k < 4; k++) {
                const v128_t scale = wasm_f32x4_mul(d, wasm_f32x4_splat((float) x->scales[8 * h + 2 * k + g]));
                store_16(out + i + 128 * h + 32 * k + 16 * g, minus(codes[k], 32), scale, no_min, false);
            }
        }
    }
}

expand_function pw_expand_function(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:    return expand_f16;
        case GGML_TYPE_BF16:   return expand_bf16;
        case GGML_TYPE_Q4_0:   return expand_q4_0;
        case GGML_TYPE_Q4_1:   return expand_q4_1;
        case GGML_TYPE_Q5_0:   return expand_q5_0;
        case GGML_TYPE_Q5_1:   return expand_q5_1;
        case GGML_TYPE_Q8_0:   return expand_q8_0;
        case GGML_TYPE_Q8_1:   return expand_q8_1;
        case GGML_TYPE_Q8_K:   return expand_q8_K;
        case GGML_TYPE_IQ4_NL: return expand_iq4_nl;
        case GGML_TYPE_Q4_K:   return expand_q4_K;
        case GGML_TYPE_Q5_K:   return expand_q5_K;
        case GGML_TYPE_Q6_K:   return expand_q6_K;
        default:               return ggml_get_type_traits(type)->to_float;
    }
}

// --- repacked weights --------------------------------------------------------------------------------------------------------

// Code times scale, and the same of what codes are too large by, are exact: their difference is the weight, or its neighbour
// where it has a minimum, which is rounded as above.
ALWAYS_INLINE v128_t weights_of(v128_t codes, v128_t scale, v128_t min) {
    return wasm_f32x4_relaxed_madd(codes, scale, min);
}

// One lane of four vectors, a row of weights.
#define LANE(v, r) wasm_i32x4_shuffle(v, v, r, r, r, r)

// Row r of four, a constant, of a panel of bytes.
ALWAYS_INLINE void store_row_of_bytes(const weight_panel * w, int g, v128_t scale, v128_t min, v128_t which, float * out) {
    for (int i = 0; i < 8; i++) {
        wasm_v128_store(out + 4 * i, weights_of(top_bytes(w->codes[i][g], which), scale, min));
    }
}

// Four rows of a panel of bytes, each row's 32 weights behind each other.
ALWAYS_INLINE void store_bytes(const weight_panel * w, int g, int bias, bool has_min, float * out, int64_t stride) {
    const v128_t scale = wasm_f32x4_mul(w->scale[g], wasm_f32x4_splat(TOP_UNIT));
    const v128_t min   = has_min ? w->min[g] : wasm_f32x4_mul(w->scale[g], wasm_f32x4_splat((float) -bias));
    store_row_of_bytes(w, g, LANE(scale, 0), LANE(min, 0), TOP_BYTES(0), out);
    store_row_of_bytes(w, g, LANE(scale, 1), LANE(min, 1), TOP_BYTES(4), out + stride);
    store_row_of_bytes(w, g, LANE(scale, 2), LANE(min, 2), TOP_BYTES(8), out + 2 * stride);
    store_row_of_bytes(w, g, LANE(scale, 3), LANE(min, 3), TOP_BYTES(12), out + 3 * stride);
}

// The same of a panel of 16-bit codes, without bias and minimum.
ALWAYS_INLINE void store_words(const weight_panel * w, int g, float * out, int64_t stride) {
    const v128_t scale = w->scale[g];
    const v128_t scales[N_ROWS] = {LANE(scale, 0), LANE(scale, 1), LANE(scale, 2), LANE(scale, 3)};
    for (int i = 0; i < 16; i += 4) {
        const v128_t steps[4] = {w->codes[i][g], w->codes[i + 1][g], w->codes[i + 2][g], w->codes[i + 3][g]};
        v128_t       rows[N_ROWS];
        turn(steps, rows);
        for (int r = 0; r < N_ROWS; r++) {
            const v128_t low = wasm_i32x4_extend_low_i16x8(rows[r]), high = wasm_i32x4_extend_high_i16x8(rows[r]);
            float *      at  = out + r * stride + 2 * i;
            wasm_v128_store(at, wasm_f32x4_mul(wasm_f32x4_convert_i32x4(low), scales[r]));
            wasm_v128_store(at + 4, wasm_f32x4_mul(wasm_f32x4_convert_i32x4(high), scales[r]));
        }
    }
}

// Functions, not inlined: their entries are safepoints.
#define STORE_PANEL(name, statement)                                                                                        \
    static __attribute__((noinline)) void name(const weight_panel * w, int bias, float * out, int64_t stride) {             \
        for (int g = 0; g < N_GROUPS; g++, out += N_ROWS * stride) {                                                        \
            statement;                                                                                                      \
        }                                                                                                                   \
    }
STORE_PANEL(store_panel, store_bytes(w, g, bias, false, out, stride))
STORE_PANEL(store_panel_min, store_bytes(w, g, bias, true, out, stride))
STORE_PANEL(store_panel_words, store_words(w, g, out, stride))

#define MAX_PANELS (QK_K / PANEL_WEIGHTS)

// By the panels that products with several columns are made of.
void pw_expand_strip(const strip_format * format, const uint8_t * x, int64_t n, float * out, int64_t stride) {
    const tile_format * tiles = format->panels;
    const bool    has_min = tiles->tiles == &pw_tiles_nibbles_min || tiles->tiles == &pw_tiles_bytes_min;
    const int64_t n_panels = ggml_blck_size(format->type) / PANEL_WEIGHTS, most = MAX_PANELS / n_panels;
    for (int64_t n_blocks; n > 0; n -= n_blocks) {
        weight_panel    panels[MAX_PANELS];
        const uint8_t * rows[PANEL_ROWS] = {x};
        n_blocks = n < most ? n : most;
        tiles->pack(n_blocks, rows, panels);
        x += (size_t) n_blocks * format->record_bytes;
        for (int64_t i = 0; i < n_blocks * n_panels; i++, out += PANEL_WEIGHTS) {
            (tiles->tiles->has_words ? store_panel_words : has_min ? store_panel_min : store_panel)(panels + i, tiles->bias, out, stride);
        }
    }
}
