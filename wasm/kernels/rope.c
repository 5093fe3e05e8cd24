// Rotary positions of floats, four pairs at a time, in place of upstream's (ops.cpp), which calls sinf and cosf for each pair of
// each token. The angles are upstream's to the last bit, their sines and cosines those of the C library but for the last
// bit of one in many thousand. Half precision and the way back are left to upstream.
//
//   mode     channels that are rotated together
//   normal   2 i and 2 i + 1
//   others   i and i + n_dims / 2
#include "ggml-cpu-impl.h"
#include "ggml.h"
#include "ops.h"

#include <math.h>
#include <string.h>
#include <wasm_simd128.h>

void pw_safepoint(void);  // sysroot/stop.c

void upstream_ggml_compute_forward_rope(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Angles are reduced in double precision, which is exact enough up to here.
#define LARGEST_ANGLE 0x1p27f

typedef struct {
    int64_t       n_dims, n_pairs, offset, apart;  // channels, pairs, the first channel, how far the two of a pair are apart
    int           mode, sections[4];
    float         theta_scale, freq_scale, ext_factor, magnitude, ramp[2];
    const float * freq_factors;
} rotation;

// --- Sines and cosines: musl's polynomials for single precision, two at a time in double precision.

static inline v128_t polynomial(v128_t z, double a, double b) {
    return wasm_f64x2_add(wasm_f64x2_splat(a), wasm_f64x2_mul(z, wasm_f64x2_splat(b)));
}

static inline v128_t sine(v128_t x, v128_t z, v128_t w) {
    const v128_t r = polynomial(z, -0x1.a00f9e2cae774p-13, 0x1.6cd878c3b46a7p-19), s = wasm_f64x2_mul(z, x);
    const v128_t first = wasm_f64x2_add(x, wasm_f64x2_mul(s, polynomial(z, -0x1.5555554cbac77p-3, 0x1.11110896efbb2p-7)));
    return wasm_f64x2_add(first, wasm_f64x2_mul(wasm_f64x2_mul(s, w), r));
}

static inline v128_t cosine(v128_t z, v128_t w) {
    const v128_t r     = polynomial(z, -0x1.6c087e80f1e27p-10, 0x1.99342e0ee5069p-16);
    const v128_t first = wasm_f64x2_add(polynomial(z, 1.0, -0x1.ffffffd0c5e81p-2),
                                        wasm_f64x2_mul(w, wasm_f64x2_splat(0x1.55553e1053a42p-5)));
    return wasm_f64x2_add(first, wasm_f64x2_mul(wasm_f64x2_mul(w, z), r));
}

// Sines and cosines of two angles less the nearest quarters of a turn, in the low lanes; the numbers of quarters.
static inline v128_t of_rest(v128_t angle, v128_t * sines, v128_t * cosines) {
    const v128_t n = wasm_f64x2_nearest(wasm_f64x2_mul(angle, wasm_f64x2_splat(0x1.45f306dc9c883p-1)));
    v128_t       x = wasm_f64x2_sub(angle, wasm_f64x2_mul(n, wasm_f64x2_splat(0x1.921fb5p+0)));
    x              = wasm_f64x2_sub(x, wasm_f64x2_mul(n, wasm_f64x2_splat(0x1.110b4611a6263p-26)));
    const v128_t z = wasm_f64x2_mul(x, x), w = wasm_f64x2_mul(z, z);
    *sines   = wasm_f32x4_demote_f64x2_zero(sine(x, z, w));
    *cosines = wasm_f32x4_demote_f64x2_zero(cosine(z, w));
    return wasm_i32x4_trunc_sat_f64x2_zero(n);
}

static inline v128_t both(v128_t low, v128_t high) {
    return wasm_i32x4_shuffle(low, high, 0, 1, 4, 5);
}

static inline void sincos_4(v128_t angle, v128_t * sines, v128_t * cosines) {
    v128_t       s0, c0, s1, c1;
    const v128_t n0 = of_rest(wasm_f64x2_promote_low_f32x4(angle), &s0, &c0);
    const v128_t n1 = of_rest(wasm_f64x2_promote_low_f32x4(wasm_i32x4_shuffle(angle, angle, 2, 3, 0, 1)), &s1, &c1);
    const v128_t n = both(n0, n1), s = both(s0, s1), c = both(c0, c1), one = wasm_i32x4_splat(1), two = wasm_i32x4_splat(2);
    const v128_t swapped = wasm_i32x4_eq(wasm_v128_and(n, one), one);
    *sines   = wasm_v128_xor(wasm_v128_bitselect(c, s, swapped), wasm_i32x4_shl(wasm_v128_and(n, two), 30));
    *cosines = wasm_v128_xor(wasm_v128_bitselect(s, c, swapped), wasm_i32x4_shl(wasm_v128_and(wasm_i32x4_add(n, one), two), 30));
}

// --- The angles of a token, and its table: the cosines of all pairs, then their sines.

// YaRN: a mixture of the angle and the angle scaled, which shifts from one to the other along the pairs.
static float mixed(const rotation * r, float angle, int64_t pair) {
    const float scaled = r->freq_scale * angle;
    if (r->ext_factor == 0.0f) {
        return scaled;
    }
    const float y    = (pair - r->ramp[0]) / MAX(0.001f, r->ramp[1] - r->ramp[0]);
    const float ramp = (1 - MIN(1, MAX(0, y))) * r->ext_factor;
    return scaled * (1 - ramp) + angle * ramp;
}

static float angle_of(const rotation * r, float theta, int64_t pair) {
    return mixed(r, r->freq_factors ? theta / r->freq_factors[pair] : theta, pair);
}

static void plain_angles(const rotation * r, int64_t position, float * angles) {
    float theta = (float) position;
    for (int64_t i = 0; i < r->n_pairs; i++) {
        angles[i] = angle_of(r, theta, i);
        theta *= r->theta_scale;
    }
}

// Which of the four positions (time, height, width, another) turns a pair.
static int axis_of(const rotation * r, int sector) {
    const int * n = r->sections;
    if (r->mode == GGML_ROPE_TYPE_IMROPE) {  // in turn, each as long as its section lasts
        return sector % 3 == 1 && sector < 3 * n[1] ? 1 : sector % 3 == 2 && sector < 3 * n[2] ? 2 : sector % 3 == 0 && sector < 3 * n[0] ? 0 : 3;
    }
    return sector < n[0] ? 0 : sector < n[0] + n[1] ? 1 : sector < n[0] + n[1] + n[2] ? 2 : 3;
}

// Several positions for each token, `stride` apart. For vision each section begins anew.
static void multi_angles(const rotation * r, const int32_t * positions, int64_t stride, float * angles) {
    const int * n      = r->sections;
    const int   starts[] = {0, n[0], n[0] + n[1], n[0] + n[1] + n[2]}, n_all = starts[3] + n[3];
    float       theta[4];
    for (int axis = 0; axis < 4; axis++) {
        theta[axis] = (float) positions[axis * stride];
    }
    for (int64_t i = 0; i < r->n_pairs; i++) {
        const int sector = (int) (i % n_all);
        for (int axis = 0; axis < 4 && r->mode == GGML_ROPE_TYPE_VISION; axis++) {
            if (sector == starts[axis]) {
                theta[axis] = (float) positions[axis * stride];
                break;
            }
        }
        angles[i] = angle_of(r, theta[axis_of(r, sector)], i);
        for (int axis = 0; axis < 4; axis++) {
            theta[axis] *= r->theta_scale;
        }
    }
}

static void fill_table(const rotation * r, float * table) {
    float *     cosines = table, * sines = table + r->n_pairs;
    const v128_t magnitude = wasm_f32x4_splat(r->magnitude);
    int64_t      i = 0;
    for (; i + 4 <= r->n_pairs; i += 4) {
        const v128_t angle = wasm_v128_load(cosines + i);
        if (!wasm_i32x4_all_true(wasm_f32x4_lt(wasm_f32x4_abs(angle), wasm_f32x4_splat(LARGEST_ANGLE)))) {
            break;  // the library's for all that are left
        }
        v128_t s, c;
        sincos_4(angle, &s, &c);
        wasm_v128_store(sines + i, wasm_f32x4_mul(s, magnitude));
        wasm_v128_store(cosines + i, wasm_f32x4_mul(c, magnitude));
    }
    for (; i < r->n_pairs; i++) {
        const float angle = cosines[i];
        sines[i]   = sinf(angle) * r->magnitude;
        cosines[i] = cosf(angle) * r->magnitude;
    }
}

// --- Turning a row. The result may be where the row is.

static inline void turn(v128_t * x, v128_t * y, v128_t cosine, v128_t sine) {
    const v128_t turned = wasm_f32x4_relaxed_nmadd(*y, sine, wasm_f32x4_mul(*x, cosine));
    *y                  = wasm_f32x4_relaxed_madd(*x, sine, wasm_f32x4_mul(*y, cosine));
    *x                  = turned;
}

static void turn_one(const float * x, const float * y, float * x_out, float * y_out, float cosine, float sine) {
    v128_t a = wasm_f32x4_splat(*x), b = wasm_f32x4_splat(*y);
    turn(&a, &b, wasm_f32x4_splat(cosine), wasm_f32x4_splat(sine));  // rounded as the others
    *x_out = wasm_f32x4_extract_lane(a, 0);
    *y_out = wasm_f32x4_extract_lane(b, 0);
}

static void turn_apart(int64_t n, int64_t apart, const float * table, const float * src, float * dst) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        v128_t x = wasm_v128_load(src + i), y = wasm_v128_load(src + apart + i);
        turn(&x, &y, wasm_v128_load(table + i), wasm_v128_load(table + n + i));
        wasm_v128_store(dst + i, x);
        wasm_v128_store(dst + apart + i, y);
    }
    for (; i < n; i++) {
        turn_one(src + i, src + apart + i, dst + i, dst + apart + i, table[i], table[n + i]);
    }
}

static void turn_neighbours(int64_t n, const float * table, const float * src, float * dst) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const v128_t a = wasm_v128_load(src + 2 * i), b = wasm_v128_load(src + 2 * i + 4);
        v128_t       x = wasm_i32x4_shuffle(a, b, 0, 2, 4, 6), y = wasm_i32x4_shuffle(a, b, 1, 3, 5, 7);
        turn(&x, &y, wasm_v128_load(table + i), wasm_v128_load(table + n + i));
        wasm_v128_store(dst + 2 * i, wasm_i32x4_shuffle(x, y, 0, 4, 1, 5));
        wasm_v128_store(dst + 2 * i + 4, wasm_i32x4_shuffle(x, y, 2, 6, 3, 7));
    }
    for (; i < n; i++) {
        turn_one(src + 2 * i, src + 2 * i + 1, dst + 2 * i, dst + 2 * i + 1, table[i], table[n + i]);
    }
}

static void turn_row(const rotation * r, const float * table, int64_t n, const float * src, float * dst) {
    if (r->mode == GGML_ROPE_TYPE_NORMAL) {
        turn_neighbours(r->n_pairs, table, src + r->offset, dst + r->offset);
    } else {
        turn_apart(r->n_pairs, r->apart, table, src + r->offset, dst + r->offset);
    }
    const int64_t end = r->offset + 2 * r->n_pairs;
    if (src != dst) {  // the others as they are
        memcpy(dst, src, (size_t) r->offset * sizeof(float));
        memcpy(dst + end, src + end, (size_t) (n - end) * sizeof(float));
    }
}

// ---

static bool is_known(int mode) {
    return mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX || mode == GGML_ROPE_TYPE_MROPE || mode == GGML_ROPE_TYPE_IMROPE ||
           mode == GGML_ROPE_TYPE_VISION;
}

static float float_param(const struct ggml_tensor * t, int i) {
    float value;
    memcpy(&value, t->op_params + i, sizeof(value));
    return value;
}

// As ggml_rope_impl and ggml_rope_set_offset lay the parameters down.
static rotation read_rotation(const struct ggml_tensor * dst) {
    const int64_t n = dst->ne[0];
    rotation      r = {.n_dims = dst->op_params[1], .mode = dst->op_params[2], .offset = dst->op_params[15]};
    GGML_ASSERT(r.n_dims <= n && r.n_dims % 2 == 0);
    GGML_ASSERT(r.offset >= 0 && r.offset % 2 == 0 && r.offset + r.n_dims <= n);
    memcpy(r.sections, dst->op_params + 11, sizeof(r.sections));
    const bool is_vision = r.mode == GGML_ROPE_TYPE_VISION;
    r.n_pairs = (is_vision ? n : r.n_dims) / 2;
    r.apart   = is_vision ? r.n_dims : r.n_dims / 2;
    if (r.mode & GGML_ROPE_TYPE_MROPE) {
        GGML_ASSERT(r.sections[0] > 0 || r.sections[1] > 0 || r.sections[2] > 0);
        GGML_ASSERT(r.sections[0] + r.sections[1] + r.sections[2] + r.sections[3] <= n);
        GGML_ASSERT(!is_vision || (r.n_dims == n / 2 && r.offset == 0));
    }
    const float base = float_param(dst, 5);
    r.freq_scale  = float_param(dst, 6);
    r.ext_factor  = float_param(dst, 7);
    r.magnitude   = float_param(dst, 8);
    r.theta_scale = powf(base, -2.0f / r.n_dims);
    ggml_rope_yarn_corr_dims((int) r.n_dims, dst->op_params[4], base, float_param(dst, 9), float_param(dst, 10), r.ramp);
    if (r.ext_factor != 0.0f) {
        r.magnitude *= 1.0f + 0.1f * logf(1.0f / r.freq_scale);
    }
    if (dst->src[2]) {
        GGML_ASSERT(dst->src[2]->type == GGML_TYPE_F32 && dst->src[2]->ne[0] >= r.n_pairs);
        r.freq_factors = dst->src[2]->data;
    }
    return r;
}

void ggml_compute_forward_rope(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * x = dst->src[0];
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float) || !is_known(dst->op_params[2])) {
        upstream_ggml_compute_forward_rope(params, dst);
        return;
    }
    GGML_ASSERT(dst->src[1]->type == GGML_TYPE_I32 && dst->type == GGML_TYPE_F32);
    const rotation  r         = read_rotation(dst);
    const int32_t * positions = dst->src[1]->data;
    const int64_t   n = x->ne[0], n_heads = x->ne[1], n_tokens = x->ne[2], n_rows = ggml_nrows(dst);
    const int64_t   per_thread = (n_rows + params->nth - 1) / params->nth;
    const int64_t   first = per_thread * params->ith, last = MIN(first + per_thread, n_rows);
    float * const   table = (float *) params->wdata + (n + CACHE_LINE_SIZE_F32) * params->ith;
    int64_t         token = -1;
    for (int64_t row = first; row < last; row++) {
        const int64_t i1 = row % n_heads, i2 = row / n_heads % n_tokens, i3 = row / n_heads / n_tokens;
        if (token != i2) {
            pw_safepoint();
            if (r.mode & GGML_ROPE_TYPE_MROPE) {
                multi_angles(&r, positions + i2, n_tokens, table);
            } else {
                plain_angles(&r, positions[i2], table);
            }
            fill_table(&r, table);
            token = i2;
        }
        turn_row(&r, table, n, (const float *) ((const char *) x->data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3]),
                 (float *) ((char *) dst->data + i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3]));
    }
}
