// Flash attention (flash_attn.c) for few rows over a cache in half precision, which is what decoding is. The keys and values
// are most of what is read, each of them once, so their order counts: by position, over all heads, which is how they lie in
// memory (a head at a time, with the others' rows skipped, takes two to three times as long). Nothing is expanded into memory;
// a value is converted in a register for up to four rows that share its head.
//
// The bits of a half, moved into a float, stand for the value times 2^-112 (f16.h). What they are multiplied with is scaled
// back instead of each of them: queries by 2^100 (and scores by 2^12), weights, which are at most 1, by 2^112. Infinities and
// NaN count as numbers of 65536 and more, as everywhere here.
#include "common.h"
#include "flash_attn.h"

#include <string.h>

#define MAX_ROWS     32  // of all heads together that a thread takes at a time
#define MAX_PER_HEAD 8   // more rows on a KV head: expanding its tiles once is faster
#define BUNDLE       4   // rows that a value is converted for
#define QUERY_SCALE  0x1p100f
#define SCORE_SCALE  0x1p12f
#define WEIGHT_SCALE 0x1p112f

// Innermost loops; the caller has safepoints.
#define INNER __attribute__((noinline, no_sanitize("coverage"))) static

// wasmtime's compiler puts all loads of a block before its arithmetic, and spills what finds no register. END_BLOCK costs
// nothing there and keeps loads behind the arithmetic before it: a branch that is never taken (which only clang cannot know)
// and would change the sums.
#define HIDE(x) __asm__("" : "+r"(x))
#define END_BLOCK(never, sums, n)               \
    HIDE(never);                                \
    if (__builtin_expect(never, 0)) {           \
        __asm__ volatile("");                   \
        for (int i_ = 0; i_ < (n); i_++) {      \
            (sums)[i_] = wasm_i32x4_splat(0);   \
        }                                       \
    }

// Some rows of one KV head.
typedef struct {
    int64_t head_kv, row;  // the first
    int     n, at;         // how many; the place of the first in the scratch
} bundle;

// What one thread works with, and the rows that are in it.
typedef struct {
    float * q;       // by bundle: [dk / 4][n][4], scaled
    float * out;     // by bundle: [dv / 8][n][even, odd][4]
    float * scores;  // [MAX_ROWS][PART_KV]
    float * buffer;  // [2][dk]
    float   largest[MAX_ROWS], sum[MAX_ROWS];
    bundle  bundles[MAX_ROWS];
    int     n_bundles, n_rows;
    int64_t head0, n_heads, batch;  // whose rows are loaded; n_heads 0: nothing is
} scratch;

static size_t scratch_floats(const problem * p) {
    return (size_t) (MAX_ROWS * (p->dk + p->dv + PART_KV) + 2 * p->dk + 15) / 16 * 16;
}

static scratch scratch_at(const problem * p, float * at) {
    scratch s = {.n_heads = 0};
    s.q       = at;
    s.out     = s.q + MAX_ROWS * p->dk;
    s.scores  = s.out + MAX_ROWS * p->dv;
    s.buffer  = s.scores + MAX_ROWS * PART_KV;
    return s;
}

// Eight halves, as float, times 2^-112: those at even places and those at odd ones.
static inline v128_t even_bits(v128_t halves) {
    return wasm_v128_and(wasm_i32x4_dot_i16x8(halves, wasm_i32x4_splat(0x2000)), wasm_i32x4_splat((int32_t) 0x8fffe000));
}

static inline v128_t odd_bits(v128_t halves) {
    return wasm_v128_and(wasm_i32x4_shr(halves, 3), wasm_i32x4_splat((int32_t) 0x8fffe000));
}

// Four halves, times 2^-112.
static inline v128_t half_bits(const char * at) {
    return wasm_v128_and(wasm_i32x4_shl(wasm_i32x4_load16x4(at), 13), wasm_i32x4_splat((int32_t) 0x8fffe000));
}

// sums[r][i] += x[i] * factors[r], for two x or four
ALWAYS_INLINE void multiply(const v128_t * x, int n_x, const char * factors, v128_t * sums, int never, int n) {
#pragma unroll
    for (int r = 0; r < n; r++) {
        const v128_t factor = wasm_v128_load(factors + 16 * r);
#pragma unroll
        for (int i = 0; i < n_x; i++) {
            sums[n_x * r + i] = wasm_f32x4_relaxed_madd(x[i], factor, sums[n_x * r + i]);
        }
        if (n == BUNDLE && r == 1) {
            END_BLOCK(never, sums, n_x * n);
        }
    }
}

// sums[r][i]: the products of query r with key i, of two or four, not yet added up.
ALWAYS_INLINE void score_some(const char * q, const char * const k[4], int n_keys, int64_t dk, v128_t * sums, int n) {
    const char * end = q + 4 * dk * n, * at[4];
    int          never = 0;
    for (int i = 0; i < n_keys; i++) {
        at[i] = k[i];
    }
    for (int i = 0; i < n_keys * n; i++) {
        sums[i] = wasm_f32x4_splat(0.0f);
    }
    do {
#pragma unroll
        for (int step = 0; step < 4; step++) {
            v128_t x[4];
            for (int i = 0; i < n_keys; i++) {
                x[i] = half_bits(at[i] + 8 * step);
            }
            multiply(x, n_keys, q + 16 * step * n, sums, never, n);
            if (step < 3) {
                END_BLOCK(never, sums, n_keys * n);
            }
        }
        for (int i = 0; i < n_keys; i++) {
            at[i] += 32;
            HIDE(at[i]);
        }
        q += 64 * n;
        HIDE(q);
    } while (q != end);
}

// scores[r * PART_KV + 0..3]: query r with four keys; all at once, if registers suffice.
ALWAYS_INLINE void score_four(const float * q, const char * const k[4], int64_t dk, float * scores, int n) {
    const int n_keys = n <= 2 ? 4 : 2;
    v128_t    sums[4 * BUNDLE], * to = sums;
#pragma nounroll
    for (int i = 0; i < 4; i += n_keys) {
        v128_t some[8];
        score_some((const char *) q, k + i, n_keys, dk, some, n);
        HIDE(to);
        for (int r = 0; r < n; r++) {
            for (int j = 0; j < n_keys; j++) {
                to[4 * r + j] = some[n_keys * r + j];
            }
        }
        to += n_keys;
    }
    for (int r = 0; r < n; r++) {
        const v128_t sum = sum_each_f32(sums[4 * r], sums[4 * r + 1], sums[4 * r + 2], sums[4 * r + 3]);
        wasm_v128_store(scores + r * PART_KV, wasm_f32x4_mul(sum, wasm_f32x4_splat(SCORE_SCALE)));
    }
}

// out += weights V for four rows of V; weights as score_four left them.
ALWAYS_INLINE void add_four(const float * weights, const char * const v[4], int64_t dv, float * out, int n) {
    v128_t         splat[4 * BUNDLE];
    const v128_t * weight = splat;
    const char *   v0 = v[0], * v1 = v[1], * v2 = v[2], * v3 = v[3];
    char *         to = (char *) out, * end = to + 4 * dv * n;
    int            never = 0;
    for (int r = 0; r < n; r++) {
        const v128_t four = wasm_f32x4_mul(wasm_v128_load(weights + r * PART_KV), wasm_f32x4_splat(WEIGHT_SCALE));
        splat[r]          = wasm_i32x4_shuffle(four, four, 0, 0, 0, 0);
        splat[n + r]      = wasm_i32x4_shuffle(four, four, 1, 1, 1, 1);
        splat[2 * n + r]  = wasm_i32x4_shuffle(four, four, 2, 2, 2, 2);
        splat[3 * n + r]  = wasm_i32x4_shuffle(four, four, 3, 3, 3, 3);
    }
    do {
        v128_t sums[2 * BUNDLE];
        HIDE(weight);
        for (int i = 0; i < 2 * n; i++) {
            sums[i] = wasm_v128_load(to + 16 * i);
        }
#pragma unroll
        for (int key = 0; key < 4; key++) {
            const char * const at = key == 0 ? v0 : key == 1 ? v1 : key == 2 ? v2 : v3;
            const v128_t       values = wasm_v128_load(at), x[2] = {even_bits(values), odd_bits(values)};
            multiply(x, 2, (const char *) (weight + key * n), sums, never, n);
            if (key < 3) {
                END_BLOCK(never, sums, 2 * n);
            }
        }
        for (int i = 0; i < 2 * n; i++) {
            wasm_v128_store(to + 16 * i, sums[i]);
        }
        v0 += 16, v1 += 16, v2 += 16, v3 += 16, to += 32 * n;
        HIDE(v0);
        HIDE(v1);
        HIDE(v2);
        HIDE(v3);
        HIDE(to);
    } while (to != end);
}

#define WITH_ROWS(n)                                                                                              \
    INNER void score_##n(const float * q, const char * const k[4], int64_t dk, float * scores) {                  \
        score_four(q, k, dk, scores, n);                                                                          \
    }                                                                                                             \
    INNER void add_##n(const float * weights, const char * const v[4], int64_t dv, float * out) {                 \
        add_four(weights, v, dv, out, n);                                                                         \
    }
WITH_ROWS(1)
WITH_ROWS(2)
WITH_ROWS(3)
WITH_ROWS(4)

// Where four rows of a cache begin, of which `left` exist; the last one stands for the others.
static inline void four_rows(const struct ggml_tensor * t, int64_t head, int64_t batch, int64_t first, int64_t left,
                             const char * at[4]) {
    const char * row = (const char *) t->data + head * t->nb[2] + batch * t->nb[3] + first * t->nb[1];
    for (int i = 0; i < 4; i++) {
        at[i] = row + (i < left ? i : left - 1) * t->nb[1];
    }
}

// The rows in the scratch against n keys of one part.
static void attend(const problem * p, scratch * s, int64_t batch, int64_t first, int64_t n) {
    const char * at[4];
    for (int64_t c = 0; c < n; c += 4) {
        for (const bundle * b = s->bundles; b < s->bundles + s->n_bundles; b++) {
            const float * q      = s->q + b->at * p->dk;
            float *       scores = s->scores + b->at * PART_KV + c;
            four_rows(p->k, b->head_kv, batch, first + c, n - c, at);
            switch (b->n) {
                case 1: score_1(q, at, p->dk, scores); break;
                case 2: score_2(q, at, p->dk, scores); break;
                case 3: score_3(q, at, p->dk, scores); break;
                default: score_4(q, at, p->dk, scores);
            }
        }
    }
    for (const bundle * b = s->bundles; b < s->bundles + s->n_bundles; b++) {
        for (int i = b->at; i < b->at + b->n; i++) {
            float * scores = s->scores + i * PART_KV;
            s->largest[i]  = pw_flash_mask(p, scores, b->head_kv, b->row + i - b->at, batch, first, n);
            s->sum[i]      = pw_flash_weigh(scores, s->largest[i], n);
        }
    }
    memset(s->out, 0, (size_t) (s->n_rows * p->dv) * sizeof(float));
    for (int64_t c = 0; c < n; c += 4) {
        for (const bundle * b = s->bundles; b < s->bundles + s->n_bundles; b++) {
            const float * weights = s->scores + b->at * PART_KV + c;
            float *       out     = s->out + b->at * p->dv;
            four_rows(p->v, b->head_kv, batch, first + c, n - c, at);
            switch (b->n) {
                case 1: add_1(weights, at, p->dv, out); break;
                case 2: add_2(weights, at, p->dv, out); break;
                case 3: add_3(weights, at, p->dv, out); break;
                default: add_4(weights, at, p->dv, out);
            }
        }
    }
}

// The rows of some heads into the scratch, those of each head in bundles as even as can be.
static void load_rows(const problem * p, scratch * s, int64_t head0, int64_t n_heads, int64_t batch) {
    const int n_each = (int) ((p->n_rows + BUNDLE - 1) / BUNDLE);
    s->n_bundles = s->n_rows = 0;
    for (int64_t head = head0; head < head0 + n_heads; head++) {
        int64_t row = 0;
        for (int i = 0; i < n_each; i++) {
            const int n = (int) (p->n_rows - row + n_each - i - 1) / (n_each - i);
            s->bundles[s->n_bundles++] = (bundle) {head, row, n, s->n_rows};
            for (int r = 0; r < n; r++) {
                float * const q = s->q + s->n_rows * p->dk;
                pw_flash_load_query(p, head, row + r, batch, s->buffer, s->buffer + p->dk);
                for (int64_t d = 0; d < p->dk; d += 4) {
                    const v128_t values = wasm_v128_load(s->buffer + d);
                    wasm_v128_store(q + d * n + 4 * r, wasm_f32x4_mul(values, wasm_f32x4_splat(QUERY_SCALE)));
                }
            }
            s->n_rows += n;
            row += n;
        }
    }
    s->head0   = head0;
    s->n_heads = n_heads;
    s->batch   = batch;
}

static void store_results(const problem * p, const scratch * s, float * results) {
    for (const bundle * b = s->bundles; b < s->bundles + s->n_bundles; b++) {
        for (int r = 0; r < b->n; r++) {
            float *       to  = results + (size_t) (b->head_kv * p->n_rows + b->row + r) * result_floats(p);
            const float * out = s->out + b->at * p->dv + 8 * r;
            to[0]             = s->largest[b->at + r];
            to[1]             = s->sum[b->at + r];
            for (int64_t d = 0; d < p->dv; d += 8, out += 8 * b->n) {
                const v128_t even = wasm_v128_load(out), odd = wasm_v128_load(out + 4);
                wasm_v128_store(to + 2 + d, wasm_i32x4_shuffle(even, odd, 0, 4, 1, 5));
                wasm_v128_store(to + 2 + d + 4, wasm_i32x4_shuffle(even, odd, 2, 6, 3, 7));
            }
        }
    }
}

static void attend_part(const problem * p, scratch * s, int64_t head0, int64_t n_heads, int64_t batch, int64_t part, int64_t used,
                        float * results) {
    const int64_t first = PART_KV * part, n = used - first < PART_KV ? used - first : PART_KV;
    bool          is_visible = false;
    pw_safepoint();
    for (int64_t head = head0; head < head0 + n_heads && !is_visible; head++) {
        is_visible = pw_flash_is_visible(p, head, batch, 0, p->n_rows, first, n);
    }
    if (!is_visible) {
        for (int64_t row = head0 * p->n_rows; row < (head0 + n_heads) * p->n_rows; row++) {
            pw_flash_clear(p, results + (size_t) row * result_floats(p));
        }
        return;
    }
    if (s->head0 != head0 || s->n_heads != n_heads || s->batch != batch) {
        load_rows(p, s, head0, n_heads, batch);
    }
    attend(p, s, batch, first, n);
    store_results(p, s, results);
}

// All parts, as many at a time as there is room for results; results[part][head_kv][row].
static void attend_batch(const problem * p, scratch * s, int64_t batch, float * totals, float * results, int64_t n_round) {
    const int    ith = p->params->ith, nth = p->params->nth;
    const size_t size = result_floats(p);
    const int64_t used = pw_flash_used(p, batch), parts = n_parts(used), n_all = p->n_head_kv * p->n_rows;
    for (int64_t i = ith; i < n_all; i += nth) {
        pw_flash_clear(p, totals + (size_t) i * size);
    }
    for (int64_t part0 = 0; part0 < parts; part0 += n_round) {
        const int64_t now = parts - part0 < n_round ? parts - part0 : n_round;
        // heads together, as long as every thread gets something to do
        int64_t n_heads = p->n_head_kv * now / (nth > 1 ? 2 * nth : 1);
        n_heads         = n_heads < MAX_ROWS / p->n_rows ? n_heads : MAX_ROWS / p->n_rows;
        n_heads         = n_heads < 1 ? 1 : n_heads < p->n_head_kv ? n_heads : p->n_head_kv;
        const int64_t n_groups = (p->n_head_kv + n_heads - 1) / n_heads;
        for (int64_t unit = ith; unit < now * n_groups; unit += nth) {
            const int64_t head0 = unit / now * n_heads, part = unit % now;
            const int64_t n     = p->n_head_kv - head0 < n_heads ? p->n_head_kv - head0 : n_heads;
            attend_part(p, s, head0, n, batch, part0 + part, used, results + (size_t) (part * n_all) * size);
        }
        ggml_barrier(p->params->threadpool);
        for (int64_t i = ith; i < n_all; i += nth) {
            for (int64_t part = 0; part < now; part++) {
                pw_flash_merge(p, totals + (size_t) i * size, results + (size_t) (part * n_all + i) * size);
            }
        }
        ggml_barrier(p->params->threadpool);
    }
    for (int64_t i = ith; i < n_all; i += nth) {
        pw_flash_finish(p, i / p->n_rows, i % p->n_rows, batch, totals + (size_t) i * size);
    }
}

// The same by one thread alone, a part at a time: nobody waits for anybody.
static void attend_batch_alone(const problem * p, scratch * s, int64_t batch, float * totals, float * results) {
    const size_t  size = result_floats(p);
    const int64_t used = pw_flash_used(p, batch), n_all = p->n_head_kv * p->n_rows, n_heads = MAX_ROWS / p->n_rows;
    for (int64_t i = 0; i < n_all; i++) {
        pw_flash_clear(p, totals + (size_t) i * size);
    }
    for (int64_t part = 0; part < n_parts(used); part++) {
        for (int64_t head0 = 0; head0 < p->n_head_kv; head0 += n_heads) {
            const int64_t n = p->n_head_kv - head0 < n_heads ? p->n_head_kv - head0 : n_heads;
            attend_part(p, s, head0, n, batch, part, used, results);
        }
        for (int64_t i = 0; i < n_all; i++) {
            pw_flash_merge(p, totals + (size_t) i * size, results + (size_t) i * size);
        }
    }
    for (int64_t i = 0; i < n_all; i++) {
        pw_flash_finish(p, i / p->n_rows, i % p->n_rows, batch, totals + (size_t) i * size);
    }
}

// Whether there are batch entries enough (sequences with a cache of their own) for every thread to have about as many.
static bool is_shared_by_batch(const problem * p) {
    const int nth = p->params->nth;
    return p->n_batch >= 4 * nth || (p->n_batch >= nth && p->n_batch % nth == 0);
}

// What ggml_graph_plan lays aside for each thread at least. There may be more, by the other operations of the graph and by the
// number of threads, but what is chosen must not depend on that: results would.
static size_t certain_room(const problem * p) {
    return (size_t) ((GGML_FA_TILE_Q + GGML_FA_TILE_KV) * (p->dk + p->dv) + 2 * GGML_FA_TILE_Q * GGML_FA_TILE_KV);
}

bool pw_flash_halves(const problem * p) {
    const size_t own = scratch_floats(p), all = own * (size_t) p->params->nth, room = p->params->wsize / sizeof(float);
    const size_t one = (size_t) (p->n_head * p->n_tokens) * result_floats(p);  // results of a part
    const bool   is_half = p->k->type == GGML_TYPE_F16 && p->v->type == GGML_TYPE_F16;
    if (!is_half || p->dk % 16 != 0 || p->dv % 8 != 0 || p->n_rows > MAX_PER_HEAD || own + 2 * one > certain_room(p)) {
        return false;
    }
    float * const work    = (float *) p->params->wdata;
    const size_t  n_round = (room - all) / one - 1, ith = (size_t) p->params->ith, nth = (size_t) p->params->nth;
    scratch       s       = scratch_at(p, work + own * ith);
    if (is_shared_by_batch(p) && all + 2 * one * nth <= room) {
        float * const results = work + all + 2 * one * ith;
        for (int64_t batch = (int64_t) ith; batch < p->n_batch; batch += (int64_t) nth) {
            attend_batch_alone(p, &s, batch, results, results + one);
        }
        return true;
    }
    for (int64_t batch = 0; batch < p->n_batch; batch++) {
        attend_batch(p, &s, batch, work + all, work + all + one, (int64_t) n_round);
    }
    return true;
}
