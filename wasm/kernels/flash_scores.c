// Flash attention: what becomes of a row of queries on its way in (rounded and scaled), of its scores (capped, masked, made
// weights), and of its result. Shared by flash_attn.c, flash_halves.c and flash_blas.c.
#include "flash_attn.h"

#include "common.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <string.h>

#define HIDDEN ((int16_t) 0xfc00)  // -inf in half precision

// exp(x) for x <= 0, to about one part in ten million: 2^n times a polynomial of what is left; 0 below -87.
static inline v128_t exp_of_negative(v128_t x) {
    const v128_t n = wasm_f32x4_nearest(wasm_f32x4_mul(x, wasm_f32x4_splat(1.44269504f)));
    v128_t       r = wasm_f32x4_relaxed_nmadd(n, wasm_f32x4_splat(0.693145752f), x);
    r              = wasm_f32x4_relaxed_nmadd(n, wasm_f32x4_splat(1.42860677e-6f), r);
    v128_t y       = wasm_f32x4_splat(1.0f / 720.0f);
    y              = wasm_f32x4_relaxed_madd(y, r, wasm_f32x4_splat(1.0f / 120.0f));
    y              = wasm_f32x4_relaxed_madd(y, r, wasm_f32x4_splat(1.0f / 24.0f));
    y              = wasm_f32x4_relaxed_madd(y, r, wasm_f32x4_splat(1.0f / 6.0f));
    y              = wasm_f32x4_relaxed_madd(y, r, wasm_f32x4_splat(0.5f));
    y              = wasm_f32x4_relaxed_madd(y, r, wasm_f32x4_splat(1.0f));
    y              = wasm_f32x4_relaxed_madd(y, r, wasm_f32x4_splat(1.0f));
    // n >= -126: the exponent can be added to
    const v128_t power = wasm_i32x4_shl(wasm_i32x4_relaxed_trunc_f32x4(n), 23);
    return wasm_v128_and(wasm_i32x4_add(y, power), wasm_f32x4_gt(x, wasm_f32x4_splat(-87.0f)));
}

static inline float sum_lanes(v128_t v) {
    v = wasm_f32x4_add(v, wasm_i32x4_shuffle(v, v, 2, 3, 0, 1));
    return wasm_f32x4_extract_lane(v, 0) + wasm_f32x4_extract_lane(v, 1);
}

// --- masks -----------------------------------------------------------------------------------------------------------------

float pw_flash_slope(const problem * p, int64_t head) {
    if (p->max_bias <= 0.0f) {
        return 1.0f;
    }
    const int   n  = 1 << (int) floorf(log2f((float) p->n_head));
    const float m0 = powf(2.0f, -p->max_bias / n), m1 = powf(2.0f, -p->max_bias / 2.0f / n);
    return head < n ? powf(m0, (float) head + 1) : powf(m1, (float) (2 * (head - n) + 1));
}

const ggml_fp16_t * pw_flash_row_mask(const problem * p, int64_t token, int64_t head, int64_t batch) {
    const struct ggml_tensor * m = p->mask;
    const char * const row = (const char *) m->data + token * m->nb[1] + head % m->ne[2] * m->nb[2] + batch % m->ne[3] * m->nb[3];
    return (const ggml_fp16_t *) row;
}

static inline bool are_eight_hidden(const ggml_fp16_t * mask) {
    return wasm_i16x8_all_true(wasm_i16x8_eq(wasm_v128_load(mask), wasm_i16x8_splat(HIDDEN)));
}

key_range pw_flash_range(const ggml_fp16_t * mask, int64_t n) {
    key_range range = {0, n};
    while (range.last >= 8 && are_eight_hidden(mask + range.last - 8)) {
        range.last -= 8;
    }
    while (range.last > 0 && (int16_t) mask[range.last - 1] == HIDDEN) {
        range.last--;
    }
    while (range.first + 8 <= range.last && are_eight_hidden(mask + range.first)) {
        range.first += 8;
    }
    while (range.first < range.last && (int16_t) mask[range.first] == HIDDEN) {
        range.first++;
    }
    return range;
}

bool pw_flash_is_plain(const ggml_fp16_t * mask, int64_t n) {
    v128_t  any = wasm_i32x4_splat(0);
    int64_t c   = 0;
    for (; c + 8 <= n; c += 8) {
        any = wasm_v128_or(any, wasm_v128_load(mask + c));
    }
    for (; c < n; c++) {
        any = wasm_v128_or(any, wasm_i16x8_splat((int16_t) mask[c]));
    }
    return !wasm_v128_any_true(any);
}

key_range pw_flash_rows_range(const problem * p, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows, int64_t first,
                              int64_t n) {
    if (!p->mask) {
        return (key_range) {0, n};
    }
    const int64_t n_planes = p->mask->ne[2] < p->n_group ? p->mask->ne[2] : p->n_group;
    key_range     all      = {n, 0};
    for (int64_t token = row0 / p->n_group; token <= (row0 + n_rows - 1) / p->n_group; token++) {
        for (int64_t plane = 0; plane < n_planes; plane++) {
            const key_range range = pw_flash_range(pw_flash_row_mask(p, token, head_kv * p->n_group + plane, batch) + first, n);
            if (range.last > 0) {
                all.first = range.first < all.first ? range.first : all.first;
                all.last  = range.last > all.last ? range.last : all.last;
            }
        }
    }
    return all;
}

bool pw_flash_is_visible(const problem * p, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows, int64_t first,
                         int64_t n) {
    if (!p->mask) {
        return true;
    }
    const int64_t n_planes = p->mask->ne[2] < p->n_group ? p->mask->ne[2] : p->n_group;
    for (int64_t token = row0 / p->n_group; token <= (row0 + n_rows - 1) / p->n_group; token++) {
        for (int64_t plane = 0; plane < n_planes; plane++) {
            if (pw_flash_range(pw_flash_row_mask(p, token, head_kv * p->n_group + plane, batch) + first, n).last > 0) {
                return true;
            }
        }
    }
    return false;
}

int64_t pw_flash_used(const problem * p, int64_t batch) {
    if (!p->mask) {
        return p->n_kv;
    }
    int64_t used = 0;
    for (int64_t plane = 0; plane < p->mask->ne[2]; plane++) {
        for (int64_t token = 0; token < p->n_tokens; token++) {
            pw_safepoint();
            used += pw_flash_range(pw_flash_row_mask(p, token, plane, batch) + used, p->n_kv - used).last;
        }
    }
    return used;
}

// --- scores ----------------------------------------------------------------------------------------------------------------

// scores = cap * tanh(scores): tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|)
static void cap_scores(float * scores, float cap, int64_t n) {
    const v128_t one = wasm_f32x4_splat(1.0f), sign = wasm_f32x4_splat(-0.0f);
    for (int64_t c = 0; c < n; c += 4) {
        const v128_t x = wasm_v128_load(scores + c);
        const v128_t e = exp_of_negative(wasm_f32x4_mul(wasm_v128_or(x, sign), wasm_f32x4_splat(2.0f)));
        const v128_t y = wasm_f32x4_div(wasm_f32x4_mul(wasm_f32x4_sub(one, e), wasm_f32x4_splat(cap)), wasm_f32x4_add(one, e));
        wasm_v128_store(scores + c, wasm_v128_bitselect(x, y, sign));
    }
}

// scores += slope * mask, of which -inf stays what it is.
static void add_mask(float * scores, const ggml_fp16_t * mask, float slope, int64_t n) {
    const v128_t infinity = wasm_f32x4_splat(-INFINITY), factor = wasm_f32x4_splat(slope);
    int64_t      c = 0;
    for (; c + 4 <= n; c += 4) {
        const v128_t halves = wasm_i16x8_shuffle(wasm_i32x4_splat(0), wasm_v128_load64_zero(mask + c), 0, 8, 1, 9, 2, 10, 3, 11);
        const v128_t value  = wasm_f32x4_relaxed_madd(factor, f16_high_to_f32(halves), wasm_v128_load(scores + c));
        wasm_v128_store(scores + c, wasm_v128_bitselect(infinity, value, wasm_i32x4_eq(halves, wasm_i32x4_splat((int32_t) 0xfc000000))));
    }
    for (; c < n; c++) {
        scores[c] += slope * GGML_CPU_FP16_TO_FP32(mask[c]);
    }
}

float pw_flash_mask_scores(const problem * p, float * scores, const ggml_fp16_t * mask, float slope, int64_t n) {
    if (p->softcap != 0.0f) {
        cap_scores(scores, p->softcap, n);
    }
    if (mask) {
        add_mask(scores, mask, slope, n);
    }
    for (int64_t c = n; c < (n + 3) / 4 * 4; c++) {
        scores[c] = -INFINITY;
    }
    v128_t best = wasm_f32x4_splat(-INFINITY);
    for (int64_t c = 0; c < n; c += 4) {
        best = wasm_f32x4_pmax(best, wasm_v128_load(scores + c));
    }
    best = wasm_f32x4_pmax(best, wasm_i32x4_shuffle(best, best, 2, 3, 0, 1));
    return fmaxf(wasm_f32x4_extract_lane(best, 0), wasm_f32x4_extract_lane(best, 1));
}

float pw_flash_mask(const problem * p, float * scores, int64_t head_kv, int64_t row, int64_t batch, int64_t first, int64_t n) {
    if (!p->mask) {
        return pw_flash_mask_scores(p, scores, NULL, 1.0f, n);
    }
    const int64_t token = row / p->n_group, head = head_kv * p->n_group + row % p->n_group;
    return pw_flash_mask_scores(p, scores, pw_flash_row_mask(p, token, head, batch) + first, pw_flash_slope(p, head), n);
}

float pw_flash_weigh(float * scores, float largest, int64_t n) {
    v128_t sum = wasm_f32x4_splat(0.0f);
    if (largest == -INFINITY) {  // nothing visible here
        memset(scores, 0, (size_t) (n + 3) / 4 * 4 * sizeof(float));
        return 0.0f;
    }
    for (int64_t c = 0; c < n; c += 4) {
        const v128_t weight = exp_of_negative(wasm_f32x4_sub(wasm_v128_load(scores + c), wasm_f32x4_splat(largest)));
        wasm_v128_store(scores + c, weight);
        sum = wasm_f32x4_add(sum, weight);
    }
    return sum_lanes(sum);
}

// --- queries and results ---------------------------------------------------------------------------------------------------

// Round a query as upstream does for its products with keys of this type, so that scores are native's: to half precision, or to
// 8 bits a block. Its kernel for long prompts over a cache in half precision keeps f32.
static void round_query(const problem * p, float * q, void * buffer) {
    const bool is_long = p->n_tokens >= GGML_FA_TILE_Q && p->k->type == GGML_TYPE_F16 && p->v->type == GGML_TYPE_F16;
    if (p->k->type == GGML_TYPE_F32 || is_long) {
        return;
    }
    // q8_1, which some types ask for, has the values of q8_0 and no reader
    const bool           is_half = p->k->type == GGML_TYPE_F16 || p->k->type == GGML_TYPE_BF16;
    const enum ggml_type type    = is_half ? p->k->type : GGML_TYPE_Q8_0;
    if (p->dk % ggml_blck_size(type) == 0) {
        ggml_get_type_traits_cpu(type)->from_float(q, buffer, p->dk);
        ggml_get_type_traits(type)->to_float(buffer, q, p->dk);
    }
}

void pw_flash_load_query(const problem * p, int64_t head_kv, int64_t row, int64_t batch, float * q, void * buffer) {
    const v128_t  scale = wasm_f32x4_splat(p->softcap != 0.0f ? p->scale / p->softcap : p->scale);
    const int64_t token = row / p->n_group, head = head_kv * p->n_group + row % p->n_group;
    memcpy(q, (const char *) p->q->data + token * p->q->nb[1] + head * p->q->nb[2] + batch * p->q->nb[3], (size_t) p->dk * sizeof(float));
    round_query(p, q, buffer);
    for (int64_t d = 0; d < p->dk; d += 4) {
        wasm_v128_store(q + d, wasm_f32x4_mul(wasm_v128_load(q + d), scale));
    }
}

void pw_flash_merge(const problem * p, float * total, const float * part) {
    if (part[1] == 0.0f) {
        return;
    }
    const float  largest = fmaxf(total[0], part[0]), old = total[1] == 0.0f ? 0.0f : expf(total[0] - largest), new = expf(part[0] - largest);
    const v128_t a = wasm_f32x4_splat(old), b = wasm_f32x4_splat(new);
    total[0] = largest;
    total[1] = total[1] * old + part[1] * new;
    for (int64_t d = 2; d < 2 + p->dv; d += 4) {
        wasm_v128_store(total + d, wasm_f32x4_add(wasm_f32x4_mul(wasm_v128_load(total + d), a), wasm_f32x4_mul(wasm_v128_load(part + d), b)));
    }
}

void pw_flash_clear(const problem * p, float * result) {
    memset(result, 0, result_floats(p) * sizeof(float));
    result[0] = -INFINITY;
}

// The result of a row: attention sinks take their share of the sum, then the output is divided by it.
void pw_flash_finish(const problem * p, int64_t head_kv, int64_t row, int64_t batch, const float * result) {
    const int64_t token = row / p->n_group, head = head_kv * p->n_group + row % p->n_group;
    float         grow = 1.0f, sum = result[1];
    if (p->sinks) {
        const float sink = ((const float *) p->sinks->data)[head];
        if (sink > result[0]) {
            grow = expf(result[0] - sink);
            sum  = sum * grow + 1.0f;
        } else {
            sum += expf(sink - result[0]);
        }
    }
    const v128_t factor = wasm_f32x4_splat(sum == 0.0f ? 0.0f : grow / sum);
    float *      to     = (float *) ((char *) p->dst->data + (batch * p->n_tokens * p->n_head + token * p->n_head + head) * p->dst->nb[1]);
    for (int64_t d = 0; d < p->dv; d += 4) {
        wasm_v128_store(to + d, wasm_f32x4_mul(wasm_v128_load(result + 2 + d), factor));
    }
}
