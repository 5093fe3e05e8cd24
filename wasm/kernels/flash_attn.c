// Flash attention (https://arxiv.org/abs/2205.14135): softmax(Q K^T * scale + mask) V over tiles of the KV cache, for all query
// heads that share a KV head at once, so that a tile is converted to f32 once for all of them. Everything is computed in f32.
//
//   q  (DK, n_tokens, n_head, n_batch) f32      k, v  (DK or DV, n_kv, n_head_kv, n_batch)      mask  (n_kv, n_tokens, ..) f16
//   dst (DV, n_head, n_tokens, n_batch) f32
//
// A row is one query: row i of a KV head is token i / n_group, head i % n_group of its group. The keys are taken in parts of
// PART_KV, whose results (largest score, sum, output) are put together in order, so that a row comes out the same whatever
// the number of threads. With few rows the threads share the parts, else the rows. Few rows over a cache in half precision go
// another way (flash_halves.c), and so do many rows where the host has a BLAS (flash_blas.c).
#include "flash_attn.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml.h"
#include "common.h"
#include "ops.h"
#include "simd-mappings.h"

#include <string.h>

void upstream_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#define TILE_ROWS 32
#define TILE_KV   64

// What one thread works with; all in ggml's work buffer.
typedef struct {
    float * q;       // [TILE_ROWS][dk], scaled
    float * k;       // [TILE_KV][dk]
    float * v;       // [TILE_KV][dv]
    float * scores;  // [TILE_ROWS][TILE_KV]
    float * out;     // [TILE_ROWS][dv]
    float * largest; // [TILE_ROWS]
    float * sum;     // [TILE_ROWS]
    float * total;   // [TILE_ROWS] results of the parts so far
} scratch;

static size_t scratch_floats(const problem * p) {
    return (size_t) (TILE_ROWS * p->dk + TILE_KV * (p->dk + p->dv) + TILE_ROWS * (TILE_KV + p->dv + 2)) + TILE_ROWS * result_floats(p);
}

static size_t own_floats(const problem * p) {
    return (scratch_floats(p) + 15) / 16 * 16;
}

static scratch scratch_at(const problem * p, float * at) {
    scratch s;
    s.q       = at;
    s.k       = s.q + TILE_ROWS * p->dk;
    s.v       = s.k + TILE_KV * p->dk;
    s.scores  = s.v + TILE_KV * p->dv;
    s.out     = s.scores + TILE_ROWS * TILE_KV;
    s.largest = s.out + TILE_ROWS * p->dv;
    s.sum     = s.largest + TILE_ROWS;
    s.total   = s.sum + TILE_ROWS;
    return s;
}

void pw_flash_expand(const struct ggml_tensor * t, int64_t head, int64_t batch, int64_t first, int64_t n, float * out) {
    const char *    base  = (const char *) t->data + head * t->nb[2] + batch * t->nb[3];
    const int64_t   width = t->ne[0];
    ggml_to_float_t to_float = ggml_get_type_traits(t->type)->to_float;
    for (int64_t i = 0; i < n; i++, out += width) {
        const char * row = base + (first + i) * t->nb[1];
        if (t->type == GGML_TYPE_F16) {
            int64_t d = 0;
            for (; d + 8 <= width; d += 8) {
                v128_t low, high;
                f16x8_load(row + 2 * d, &low, &high);
                wasm_v128_store(out + d, low);
                wasm_v128_store(out + d + 4, high);
            }
            for (; d < width; d += 4) {
                wasm_v128_store(out + d, f16x4_load(row + 2 * d));
            }
        } else if (t->type == GGML_TYPE_F32) {
            memcpy(out, row, (size_t) width * sizeof(float));
        } else {
            to_float(row, out, width);
        }
    }
}

// Two rows at a time, or one row as both: both then compute and store the same.

// Scores of two queries against four keys at a time; n is a multiple of four.
static void score_rows(const float * q0, const float * q1, const float * k, int64_t dk, int64_t n, float * s0, float * s1) {
    for (int64_t c = 0; c < n; c += 4, k += 4 * dk) {
        v128_t a[4], b[4];
        for (int j = 0; j < 4; j++) {
            a[j] = b[j] = wasm_f32x4_splat(0.0f);
        }
        for (int64_t d = 0; d < dk; d += 4) {
            const v128_t x = wasm_v128_load(q0 + d), y = wasm_v128_load(q1 + d);
            for (int j = 0; j < 4; j++) {
                const v128_t key = wasm_v128_load(k + j * dk + d);
                a[j] = wasm_f32x4_relaxed_madd(x, key, a[j]);
                b[j] = wasm_f32x4_relaxed_madd(y, key, b[j]);
            }
        }
        wasm_v128_store(s0 + c, sum_each_f32(a[0], a[1], a[2], a[3]));
        wasm_v128_store(s1 + c, sum_each_f32(b[0], b[1], b[2], b[3]));
    }
}

// out0 += p0 V and out1 += p1 V over n rows of V; 16 columns at a time.
static void add_values(const float * p0, const float * p1, const float * v, int64_t dv, int64_t n, float * out0, float * out1) {
    int64_t d = 0;
    for (; d + 16 <= dv; d += 16) {
        v128_t a[4], b[4];
        for (int j = 0; j < 4; j++) {
            a[j] = wasm_v128_load(out0 + d + 4 * j);
            b[j] = wasm_v128_load(out1 + d + 4 * j);
        }
        for (int64_t c = 0; c < n; c++) {
            const v128_t x = wasm_v128_load32_splat(p0 + c), y = wasm_v128_load32_splat(p1 + c);
            for (int j = 0; j < 4; j++) {
                const v128_t value = wasm_v128_load(v + c * dv + d + 4 * j);
                a[j] = wasm_f32x4_relaxed_madd(x, value, a[j]);
                b[j] = wasm_f32x4_relaxed_madd(y, value, b[j]);
            }
        }
        for (int j = 0; j < 4; j++) {
            wasm_v128_store(out0 + d + 4 * j, a[j]);
            wasm_v128_store(out1 + d + 4 * j, b[j]);
        }
    }
    for (; d < dv; d += 4) {
        v128_t a = wasm_v128_load(out0 + d), b = wasm_v128_load(out1 + d);
        for (int64_t c = 0; c < n; c++) {
            const v128_t value = wasm_v128_load(v + c * dv + d);
            a = wasm_f32x4_relaxed_madd(wasm_v128_load32_splat(p0 + c), value, a);
            b = wasm_f32x4_relaxed_madd(wasm_v128_load32_splat(p1 + c), value, b);
        }
        wasm_v128_store(out0 + d, a);
        wasm_v128_store(out1 + d, b);
    }
}

// Scores to weights; the output so far is brought to the new largest score.
static void soften_row(const problem * p, scratch * s, int64_t head_kv, int64_t batch, int64_t row0, int64_t row, int64_t first, int64_t n) {
    float *     scores  = s->scores + row * TILE_KV;
    const float largest = fmaxf(s->largest[row], pw_flash_mask(p, scores, head_kv, row0 + row, batch, first, n));
    if (largest > s->largest[row]) {
        const float shrink = expf(s->largest[row] - largest);
        s->sum[row] *= shrink;
        for (int64_t d = 0; d < p->dv; d += 4) {
            float * out = s->out + row * p->dv + d;
            wasm_v128_store(out, wasm_f32x4_mul(wasm_v128_load(out), wasm_f32x4_splat(shrink)));
        }
        s->largest[row] = largest;
    }
    s->sum[row] += pw_flash_weigh(scores, largest, n);
}

static void load_queries(const problem * p, scratch * s, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows) {
    for (int64_t row = 0; row < n_rows; row++) {
        pw_flash_load_query(p, head_kv, row0 + row, batch, s->q + row * p->dk, s->k);  // keys come later
    }
}

// One tile of the cache for all rows.
static void attend_tile(const problem * p, scratch * s, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows, int64_t first, int64_t n) {
    const int64_t padded = (n + 3) / 4 * 4;
    pw_flash_expand(p->k, head_kv, batch, first, n, s->k);
    pw_flash_expand(p->v, head_kv, batch, first, n, s->v);
    memset(s->k + n * p->dk, 0, (size_t) ((padded - n) * p->dk) * sizeof(float));
    for (int64_t row = 0; row < n_rows; row += 2) {
        const int64_t other = row + 1 < n_rows ? row + 1 : row;
        score_rows(s->q + row * p->dk, s->q + other * p->dk, s->k, p->dk, padded, s->scores + row * TILE_KV, s->scores + other * TILE_KV);
        for (int64_t i = row; i <= other; i++) {
            soften_row(p, s, head_kv, batch, row0, i, first, n);
        }
        add_values(s->scores + row * TILE_KV, s->scores + other * TILE_KV, s->v, p->dv, n, s->out + row * p->dv, s->out + other * p->dv);
    }
}

// The loaded rows of one KV head against one part of the keys; results stay in the scratch.
static void attend_part(const problem * p, scratch * s, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows, int64_t part, int64_t used) {
    const int64_t first = PART_KV * part, last = used - first < PART_KV ? used : first + PART_KV;
    for (int64_t row = 0; row < n_rows; row++) {
        s->largest[row] = -INFINITY;
        s->sum[row]     = 0.0f;
    }
    memset(s->out, 0, (size_t) (n_rows * p->dv) * sizeof(float));
    for (int64_t at = first; at < last; at += TILE_KV) {
        pw_safepoint();
        const int64_t n = last - at < TILE_KV ? last - at : TILE_KV;
        if (pw_flash_is_visible(p, head_kv, batch, row0, n_rows, at, n)) {
            attend_tile(p, s, head_kv, batch, row0, n_rows, at, n);
        }
    }
}

static void take_result(const problem * p, const scratch * s, int64_t row, float * result) {
    result[0] = s->largest[row];
    result[1] = s->sum[row];
    memcpy(result + 2, s->out + row * p->dv, (size_t) p->dv * sizeof(float));
}

// Tiles of rows of one KV head, each with all parts of the keys.
static void attend_rows(const problem * p, scratch * s, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows, int64_t used) {
    load_queries(p, s, head_kv, batch, row0, n_rows);
    for (int64_t i = 0; i < n_rows; i++) {
        pw_flash_clear(p, s->total + (size_t) i * result_floats(p));
    }
    for (int64_t part = 0; part < n_parts(used); part++) {
        attend_part(p, s, head_kv, batch, row0, n_rows, part, used);
        for (int64_t i = 0; i < n_rows; i++) {
            float * const result = s->scores;  // their place is free again
            take_result(p, s, i, result);
            pw_flash_merge(p, s->total + (size_t) i * result_floats(p), result);
        }
    }
    for (int64_t i = 0; i < n_rows; i++) {
        pw_flash_finish(p, head_kv, row0 + i, batch, s->total + (size_t) i * result_floats(p));
    }
}

// The same for any number of rows, in this thread's part of the work buffer.
void pw_flash_attend_rows(const problem * p, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows) {
    scratch       s    = scratch_at(p, (float *) p->params->wdata + own_floats(p) * (size_t) p->params->ith);
    const int64_t used = pw_flash_used(p, batch);
    for (int64_t row = row0; row < row0 + n_rows; row += TILE_ROWS) {
        attend_rows(p, &s, head_kv, batch, row, row0 + n_rows - row < TILE_ROWS ? row0 + n_rows - row : TILE_ROWS, used);
    }
}

// Tiles of rows, taken by the threads in turn.
static void attend_by_rows(const problem * p, scratch * s) {
    const struct ggml_compute_params * params = p->params;
    const int64_t n_tiles = (p->n_rows + TILE_ROWS - 1) / TILE_ROWS, n_units = n_tiles * p->n_head_kv * p->n_batch;
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    int64_t known = -1, used = 0;
    for (int64_t unit = params->ith; unit < n_units; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t tile = unit % n_tiles, head_kv = unit / n_tiles % p->n_head_kv, batch = unit / n_tiles / p->n_head_kv;
        const int64_t row0 = TILE_ROWS * tile, n_rows = p->n_rows - row0 < TILE_ROWS ? p->n_rows - row0 : TILE_ROWS;
        if (batch != known) {
            used  = pw_flash_used(p, batch);
            known = batch;
        }
        attend_rows(p, s, head_kv, batch, row0, n_rows, used);
    }
}

// Few rows: the threads share the parts of the keys; results[head_kv][part][row], put together for one batch entry at a time.
static void attend_by_parts(const problem * p, scratch * s, float * results) {
    const int    ith = p->params->ith, nth = p->params->nth;
    const size_t size = result_floats(p);
    for (int64_t batch = 0; batch < p->n_batch; batch++) {
        const int64_t used = pw_flash_used(p, batch), parts = n_parts(used);
        for (int64_t unit = ith; unit < parts * p->n_head_kv; unit += nth) {
            load_queries(p, s, unit / parts, batch, 0, p->n_rows);
            attend_part(p, s, unit / parts, batch, 0, p->n_rows, unit % parts, used);
            for (int64_t row = 0; row < p->n_rows; row++) {
                take_result(p, s, row, results + (size_t) (unit * p->n_rows + row) * size);
            }
        }
        ggml_barrier(p->params->threadpool);
        for (int64_t i = ith; i < p->n_head_kv * p->n_rows; i += nth) {
            const int64_t head_kv = i / p->n_rows, row = i % p->n_rows;
            pw_flash_clear(p, s->total);
            for (int64_t part = 0; part < parts; part++) {
                pw_flash_merge(p, s->total, results + (size_t) ((head_kv * parts + part) * p->n_rows + row) * size);
            }
            pw_flash_finish(p, head_kv, row, batch, s->total);
        }
        ggml_barrier(p->params->threadpool);
    }
}

static problem read_problem(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    problem p = {.params = params, .dst = dst, .q = dst->src[0], .k = dst->src[1], .v = dst->src[2], .mask = dst->src[3], .sinks = dst->src[4]};
    memcpy(&p.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&p.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&p.softcap, (const float *) dst->op_params + 2, sizeof(float));
    p.dk        = p.q->ne[0];
    p.dv        = p.v->ne[0];
    p.n_tokens  = p.q->ne[1];
    p.n_kv      = p.k->ne[1];
    p.n_head    = p.q->ne[2];
    p.n_head_kv = p.k->ne[2];
    p.n_batch   = p.q->ne[3];
    p.n_group   = p.n_head / p.n_head_kv;
    p.n_rows    = p.n_tokens * p.n_group;
    return p;
}

static bool is_expandable(const struct ggml_tensor * t) {
    return (t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float) && t->nb[0] == ggml_type_size(t->type);
}

// Shapes and types that the kernel is written for; the others are left to upstream's.
static bool is_ours(const problem * p) {
    return !p->params->use_ref && p->q->type == GGML_TYPE_F32 && p->q->nb[0] == sizeof(float) && is_expandable(p->k) && is_expandable(p->v) &&
           p->k->ne[2] == p->v->ne[2] && p->k->ne[3] == p->n_batch && p->v->ne[3] == p->n_batch && p->dk % 4 == 0 && p->dv % 4 == 0 && p->dv + 2 <= TILE_ROWS * TILE_KV &&
           p->n_head % p->n_head_kv == 0 && (!p->mask || p->mask->type == GGML_TYPE_F16);
}

void ggml_compute_forward_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const problem p        = read_problem(params, dst);
    const size_t  own      = own_floats(&p);
    const size_t  all      = own * (size_t) params->nth;
    const size_t  results  = (size_t) (p.n_head * p.n_tokens * n_parts(p.n_kv)) * result_floats(&p);
    const size_t  room     = params->wsize / sizeof(float);
    if (!is_ours(&p) || all > room) {
        // Its reference way: the others cut the keys of a row into as many parts as there are threads.
        struct ggml_compute_params plain = *params;
        plain.use_ref                    = true;
        upstream_flash_attn_ext(&plain, dst);
        return;
    }
    if (pw_flash_halves(&p) || pw_flash_blas(&p)) {
        return;
    }
    float * const work = (float *) params->wdata;
    scratch       s    = scratch_at(&p, work + own * (size_t) params->ith);
    if (params->nth > 1 && p.n_rows <= TILE_ROWS && all + results <= room) {
        attend_by_parts(&p, &s, work + all);
    } else {
        attend_by_rows(&p, &s);
    }
}
