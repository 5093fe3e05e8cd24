// Rows of f16, bf16 and f32 against activations of the same type, and ggml's dot products of f16 and bf16, for one or four rows
// (see rows.h). n is the number of values, any.
//
// Halves are not put in order: of each 32 bits the upper half is one value and the lower half another, in both operands alike.
#include "rows.h"

#include "ggml.h"

#include <string.h>

// f16: the bits of a weight moved into those of a float are 2^-112 times its value, those of an activation are mended and made
// FAR times theirs, by one multiplication. Products below 2^-29 are then subnormal and rounded to multiples of 2^-52: at most a
// sixteenth of what rounding the activation to a half may have lost. No sum comes near the end of what a float holds.
#define FAR 0x1p15f

typedef enum { F16, BF16, F32 } float_kind;

#define SIGN_AND_REST ((int32_t) 0x8fffe000)
#define UPPER_HALF ((int32_t) 0xffff0000)

// Sixteen bytes of a row as floats: upper halves and lower halves, or for f32 all in `upper`.
typedef struct {
    v128_t upper, lower;
} floats;

ALWAYS_INLINE floats read_weights(v128_t bytes, float_kind kind) {
    // times 2^13, with the sign extended: one instruction where two shifts would be two
    const v128_t times = wasm_i16x8_make(1 << 13, 0, 1 << 13, 0, 1 << 13, 0, 1 << 13, 0);
    const v128_t mask  = wasm_i32x4_splat(SIGN_AND_REST);
    switch (kind) {
        case F16:  return (floats) {wasm_i32x4_shr(bytes, 3) & mask, wasm_i32x4_dot_i16x8(bytes, times) & mask};
        case BF16: return (floats) {bytes & wasm_i32x4_splat(UPPER_HALF), wasm_i32x4_shl(bytes, 16)};
        default:   return (floats) {bytes, bytes};
    }
}

ALWAYS_INLINE floats read_activations(v128_t bytes, float_kind kind) {
    const floats y = read_weights(bytes, kind);
    const v128_t f = wasm_f32x4_splat(0x1p112f * FAR);
    return kind == F16 ? (floats) {wasm_f32x4_mul(y.upper, f), wasm_f32x4_mul(y.lower, f)} : y;
}

ALWAYS_INLINE v128_t add_products(v128_t sum, v128_t weights, floats y, float_kind kind) {
    const floats w = read_weights(weights, kind);
    sum            = wasm_f32x4_relaxed_madd(w.upper, y.upper, sum);
    return kind == F32 ? sum : wasm_f32x4_relaxed_madd(w.lower, y.lower, sum);
}

// Up to sixteen bytes at p, and zeros.
ALWAYS_INLINE v128_t load_up_to(const uint8_t * p, size_t n_bytes) {
    uint8_t bytes[16] = {0};
    if (n_bytes >= sizeof(bytes)) {
        return wasm_v128_load(p);
    }
    memcpy(bytes, p, n_bytes);
    return wasm_v128_load(bytes);
}

#define N_SUMS 4

// The products of the last n_bytes of the rows. A function of its own: what it needs would take registers from the loop.
__attribute__((noinline)) static void add_rest(size_t n_bytes, const uint8_t * const x[N_ROWS], const uint8_t * y,
                                               v128_t sums[N_SUMS], float_kind kind, int n_rows) {
    for (size_t at = 0; at < n_bytes; at += 16) {
        const floats activations = read_activations(load_up_to(y + at, n_bytes - at), kind);
        for (int r = 0; r < n_rows; r++) {
            sums[r] = add_products(sums[r], load_up_to(x[r] + at, n_bytes - at), activations, kind);
        }
    }
}

#define PARTS 4  // of sixteen bytes of each row, at a time
#define STEP ((size_t) 16 * PARTS)

// The sums of four vectors of floats, one in each lane.
ALWAYS_INLINE v128_t sum_of_each(const v128_t v[4]) {
    const v128_t low  = wasm_f32x4_add(wasm_i32x4_shuffle(v[0], v[1], 0, 4, 1, 5), wasm_i32x4_shuffle(v[0], v[1], 2, 6, 3, 7));
    const v128_t high = wasm_f32x4_add(wasm_i32x4_shuffle(v[2], v[3], 0, 4, 1, 5), wasm_i32x4_shuffle(v[2], v[3], 2, 6, 3, 7));
    return wasm_f32x4_add(wasm_i64x2_shuffle(low, high, 0, 2), wasm_i64x2_shuffle(low, high, 1, 3));
}

// Four rows with a sum each, or one row with a sum for each part.
ALWAYS_INLINE void rows_of_floats(int64_t n, const uint8_t * const * start, const uint8_t * y, float * out,
                                  float_kind kind, int n_rows) {
    const uint8_t * x[N_ROWS];
    v128_t          sums[N_SUMS];
    for (int r = 0; r < n_rows; r++) {
        x[r] = start[r];
    }
    for (int i = 0; i < N_SUMS; i++) {
        sums[i] = wasm_f32x4_splat(0.0f);
    }
    size_t rest = (size_t) n * (kind == F32 ? sizeof(float) : sizeof(uint16_t));
    for (; rest >= STEP; rest -= STEP, y += STEP) {
#pragma clang loop unroll(full)
        for (size_t part = 0; part < PARTS; part++) {
            const floats activations = read_activations(wasm_v128_load(y + 16 * part), kind);
#pragma clang loop unroll(full)
            for (int r = 0; r < n_rows; r++) {
                const int i = n_rows == 1 ? part : r;
                sums[i]     = add_products(sums[i], wasm_v128_load(x[r] + 16 * part), activations, kind);
                if (i % 2 == 1 && !(part == PARTS - 1 && r == n_rows - 1)) {
                    sums[i - 1] = calculated(sums[i - 1], y);
                    sums[i]     = calculated(sums[i], y);
                }
            }
        }
        for (int r = 0; r < n_rows; r++) {
            x[r] += STEP;
            OPAQUE(x[r]);
        }
        OPAQUE(y);
    }
    if (rest) {
        v128_t more[N_SUMS] = {sums[0], sums[1], sums[2], sums[3]};
        add_rest(rest, x, y, more, kind, n_rows);
        for (int i = 0; i < N_SUMS; i++) {
            sums[i] = more[i];
        }
    }
    const float unit = kind == F16 ? 0x1p112f / FAR : 1.0f;
    if (n_rows == 1) {
        out[0] = sum_of_lanes(wasm_f32x4_add(wasm_f32x4_add(sums[0], sums[1]), wasm_f32x4_add(sums[2], sums[3]))) * unit;
    } else {
        wasm_v128_store(out, wasm_f32x4_mul(sum_of_each(sums), wasm_f32x4_splat(unit)));
    }
}

void pw_rows_f16(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out) {
    rows_of_floats(n, x, y, out, F16, N_ROWS);
}

void pw_rows_bf16(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out) {
    rows_of_floats(n, x, y, out, BF16, N_ROWS);
}

void pw_rows_f32(int64_t n, const uint8_t * const x[N_ROWS], const uint8_t * y, float * out) {
    rows_of_floats(n, x, y, out, F32, N_ROWS);
}

void ggml_vec_dot_f16(int n, float * s, size_t unused_bs, const ggml_fp16_t * x, size_t unused_bx, const ggml_fp16_t * y,
                      size_t unused_by, int unused_nrc) {
    const uint8_t * row = (const uint8_t *) x;
    rows_of_floats(n, &row, (const uint8_t *) y, s, F16, 1);
}

void ggml_vec_dot_bf16(int n, float * s, size_t unused_bs, const ggml_bf16_t * x, size_t unused_bx, const ggml_bf16_t * y,
                       size_t unused_by, int unused_nrc) {
    const uint8_t * row = (const uint8_t *) x;
    rows_of_floats(n, &row, (const uint8_t *) y, s, BF16, 1);
}
