// Normalizations of rows of floats, four values at a time, in place of upstream's (ops.cpp), which add up one by one, in double
// precision, as here. Rows are shared out among the threads: a row comes out the same whatever their number.
#include "ggml-cpu-impl.h"
#include "ggml.h"
#include "ops.h"

#include <math.h>
#include <string.h>
#include <wasm_simd128.h>

void pw_safepoint(void);  // sysroot/stop.c

void upstream_ggml_compute_forward_norm(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void upstream_ggml_compute_forward_l2_norm(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// The parts of a sum in double precision: the order in which floats are added then hardly shows in the result.
typedef struct {
    v128_t low, high;
} sums;

static inline void add(sums * s, v128_t values) {
    s->low  = wasm_f64x2_add(s->low, wasm_f64x2_promote_low_f32x4(values));
    s->high = wasm_f64x2_add(s->high, wasm_f64x2_promote_low_f32x4(wasm_i32x4_shuffle(values, values, 2, 3, 0, 1)));
}

static inline double total(sums s) {
    const v128_t v = wasm_f64x2_add(s.low, s.high);
    return wasm_f64x2_extract_lane(v, 0) + wasm_f64x2_extract_lane(v, 1);
}

static double sum(const float * x, int64_t n) {
    sums    s = {wasm_f64x2_splat(0.0), wasm_f64x2_splat(0.0)};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        add(&s, wasm_v128_load(x + i));
    }
    double result = total(s);
    for (; i < n; i++) {
        result += x[i];
    }
    return result;
}

// The sum of the squares, each rounded to single precision as upstream's.
static double sum_of_squares(const float * x, int64_t n) {
    sums    a = {wasm_f64x2_splat(0.0), wasm_f64x2_splat(0.0)}, b = a;  // two, since each addition waits for the last
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const v128_t u = wasm_v128_load(x + i), v = wasm_v128_load(x + i + 4);
        add(&a, wasm_f32x4_mul(u, u));
        add(&b, wasm_f32x4_mul(v, v));
    }
    double result = total(a) + total(b);
    for (; i < n; i++) {
        const float square = x[i] * x[i];
        result += square;
    }
    return result;
}

// y = x - mean; returns the sum of the squares.
static double center(const float * x, float * y, int64_t n, float mean) {
    sums    s = {wasm_f64x2_splat(0.0), wasm_f64x2_splat(0.0)};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const v128_t v = wasm_f32x4_sub(wasm_v128_load(x + i), wasm_f32x4_splat(mean));
        wasm_v128_store(y + i, v);
        add(&s, wasm_f32x4_mul(v, v));
    }
    double result = total(s);
    for (; i < n; i++) {
        y[i] = x[i] - mean;
        const float square = y[i] * y[i];
        result += square;
    }
    return result;
}

// y = x * scale, and times w where there is one.
static void scale_row(const float * x, const float * w, float * y, int64_t n, float scale) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const v128_t v = wasm_f32x4_mul(wasm_v128_load(x + i), wasm_f32x4_splat(scale));
        wasm_v128_store(y + i, w ? wasm_f32x4_mul(v, wasm_v128_load(w + i)) : v);
    }
    for (; i < n; i++) {
        y[i] = w ? x[i] * scale * w[i] : x[i] * scale;
    }
}

static float epsilon_of(const struct ggml_tensor * t) {
    float eps;
    memcpy(&eps, t->op_params, sizeof(eps));
    GGML_ASSERT(eps >= 0.0f);
    return eps;
}

static float * row_of(const struct ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return (float *) ((char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
}

static void check(const struct ggml_tensor * src, const struct ggml_tensor * dst) {
    GGML_ASSERT(src->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32);
    GGML_ASSERT(ggml_are_same_shape(src, dst));
    GGML_ASSERT(src->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));
}

#define EACH_ROW(params, t)                                                     \
    for (int64_t i3 = 0; i3 < (t)->ne[3]; i3++)                                 \
        for (int64_t i2 = 0; i2 < (t)->ne[2]; i2++)                             \
            for (int64_t i1 = (params)->ith; i1 < (t)->ne[1]; i1 += (params)->nth)

// dst = rms_norm(x), times weights that are repeated over the rows.
static void rms_norm(const struct ggml_compute_params * params, const struct ggml_tensor * x, const struct ggml_tensor * weights,
                     struct ggml_tensor * dst, float eps) {
    check(x, dst);
    const int64_t n = x->ne[0];
    EACH_ROW(params, x) {
        pw_safepoint();
        const float * row   = row_of(x, i1, i2, i3);
        const float   mean  = (float) (sum_of_squares(row, n) / (double) n);
        const float * w     = weights ? row_of(weights, i1 % weights->ne[1], i2 % weights->ne[2], i3 % weights->ne[3]) : NULL;
        scale_row(row, w, row_of(dst, i1, i2, i3), n, 1.0f / sqrtf(mean + eps));
    }
}

void ggml_compute_forward_rms_norm(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    rms_norm(params, dst->src[0], NULL, dst, epsilon_of(dst));
}

// The normalization and the product with its weights in one; ggml sees to it that these are rows of floats as long as x's.
void ggml_compute_forward_rms_norm_mul_fused(const struct ggml_compute_params * params, struct ggml_tensor * norm, struct ggml_tensor * dst) {
    GGML_ASSERT(dst->src[0] == norm || dst->src[1] == norm);
    rms_norm(params, norm->src[0], dst->src[0] == norm ? dst->src[1] : dst->src[0], dst, epsilon_of(norm));
}

void ggml_compute_forward_norm(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * x = dst->src[0];
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float)) {
        upstream_ggml_compute_forward_norm(params, dst);
        return;
    }
    check(x, dst);
    const float   eps = epsilon_of(dst);
    const int64_t n   = x->ne[0];
    EACH_ROW(params, x) {
        pw_safepoint();
        float *       y        = row_of(dst, i1, i2, i3);
        const float * row      = row_of(x, i1, i2, i3);
        const float   mean     = (float) sum(row, n) / (float) n;
        const float   variance = (float) (center(row, y, n, mean) / (double) n);
        scale_row(y, NULL, y, n, 1.0f / sqrtf(variance + eps));
    }
}

void ggml_compute_forward_l2_norm(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * x = dst->src[0];
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float)) {
        upstream_ggml_compute_forward_l2_norm(params, dst);
        return;
    }
    check(x, dst);
    const float eps = epsilon_of(dst);
    EACH_ROW(params, x) {
        pw_safepoint();
        const float * row   = row_of(x, i1, i2, i3);
        const float   scale = 1.0f / fmaxf(sqrtf((float) sum_of_squares(row, x->ne[0])), eps);
        scale_row(row, NULL, row_of(dst, i1, i2, i3), x->ne[0], scale);
    }
}

// The channels of a group (the third dimension) are one row. Groups are shared out among the threads.
void ggml_compute_forward_group_norm(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * x = dst->src[0];
    check(x, dst);
    float eps;
    memcpy(&eps, dst->op_params + 1, sizeof(eps));
    const int64_t n = x->ne[0], n_channels = x->ne[2], n_groups = dst->op_params[0], size = (n_channels + n_groups - 1) / n_groups;
    for (int64_t group = params->ith; group < n_groups; group += params->nth) {
        const int64_t first = group * size, last = MIN(first + size, n_channels);
        const double  n_all = (double) (n * x->ne[1] * (last - first));
        for (int64_t i3 = 0; i3 < x->ne[3]; i3++) {
            double all = 0.0, squares = 0.0;
            for (int64_t i2 = first; i2 < last; i2++) for (int64_t i1 = 0; i1 < x->ne[1]; i1++) {
                pw_safepoint();
                all += sum(row_of(x, i1, i2, i3), n);
            }
            const float mean = (float) (all / n_all);
            for (int64_t i2 = first; i2 < last; i2++) for (int64_t i1 = 0; i1 < x->ne[1]; i1++) {
                squares += center(row_of(x, i1, i2, i3), row_of(dst, i1, i2, i3), n, mean);
            }
            const float scale = 1.0f / sqrtf((float) (squares / n_all) + eps);
            for (int64_t i2 = first; i2 < last; i2++) for (int64_t i1 = 0; i1 < x->ne[1]; i1++) {
                scale_row(row_of(dst, i1, i2, i3), NULL, row_of(dst, i1, i2, i3), n, scale);
            }
        }
    }
}
