// Rows of f16, bf16 and f32 against activations of the same type, and ggml's dot products of f16 and bf16, for one or four rows
// (see rows.h). n is the number of values, any.
#include "floats.h"

#include "ggml.h"

// f16: weights are 2^-112 times their value, those of an activation are mended and made FAR times theirs, by one
// multiplication. Products below 2^-29 are then subnormal and rounded to multiples of 2^-52: at most a sixteenth of what
// rounding the activation to a half may have lost. No sum comes near the end of what a float holds.
#define FAR 0x1p15f

ALWAYS_INLINE floats read_activations(v128_t bytes, float_kind kind) {
    const floats y = read_floats(bytes, kind);
    const v128_t f = wasm_f32x4_splat(0x1p112f * FAR);
    return kind == F16 ? (floats) {wasm_f32x4_mul(y.upper, f), wasm_f32x4_mul(y.lower, f)} : y;
}

ALWAYS_INLINE v128_t add_products(v128_t sum, v128_t weights, floats y, float_kind kind) {
    const floats w = read_floats(weights, kind);
    sum            = wasm_f32x4_relaxed_madd(w.upper, y.upper, sum);
    return kind == F32 ? sum : wasm_f32x4_relaxed_madd(w.lower, y.lower, sum);
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
