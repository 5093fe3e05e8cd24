// Flash attention (flash_attn.c) for many rows, which is what prefill is, by the host's BLAS (blas.c): a block of rows of one
// KV head at a time, with all query heads that share it, against a chunk of the keys.
//
//   S = Q K^T     (rows x keys)    by the host      K as f32, a row for each key
//   P = soft-max of the masked S   here             largest score and sum of each row go from chunk to chunk
//   O = P V       (rows x dv)      by the host      V as f32, transposed: the host multiplies rows with rows
//
// What no row of a block sees at either end of a chunk is left out of both products, so that of a causal mask little more than
// half is computed; that is read off the mask, whatever it means. A thread takes a run of blocks, for which keys and values are
// expanded once. The shapes of the products, and with them the last bits of a result, follow from the problem alone, not from
// runs or threads.
#include "blas.h"
#include "flash_attn.h"

#include "ggml-cpu.h"

#include <string.h>

#define CHUNK_KV   512
#define STRIDE     (CHUNK_KV + 16)  // of scores and values: no power of two, whose rows would share lines of the cache
#define MULTIPLE   16               // of the keys of a product
#define MOST_ROWS  192              // of a block; more than that only where more heads share a KV head
#define LEAST_ROWS 64
#define LEAST_BLOCKS 8              // of all KV heads together, if that leaves them LEAST_ROWS
#define MAX_RUN    4                // blocks
#define RUNS_PER_THREAD 4
#define MIN_ROWS   24               // of a KV head: with fewer, expanding takes too large a part
#define MIN_KEYS   64
#define MIN_WIDTH  32
#define MIN_PRODUCTS (1 << 22)      // of a KV head: a call of the host costs some 20 microseconds

// How rows are shared out.
typedef struct {
    int64_t n_rows;    // of a block: whole tokens
    int64_t n_blocks;  // of a KV head
    int64_t n_run;     // blocks of a run
    int64_t n_runs;    // of a KV head
} plan;

// Some rows of one KV head and batch entry, and the keys of the present chunk, counted from its beginning, that they see.
typedef struct {
    int64_t   head_kv, batch, row, n_rows;
    float *   q;      // [n_rows][dk]
    float *   total;  // [n_rows] results of the chunks so far
    key_range range;  // in multiples of MULTIPLE
} block;

// What one thread works with.
typedef struct {
    float * k;       // [CHUNK_KV][dk]
    float * v;       // [dv][STRIDE]
    float * scores;  // [rows of a block][STRIDE]
    float * part;    // [rows of a block][dv]
    float * shrink;  // [rows of a block]
    float * buffer;  // [4][dk or dv]
    float * q;       // of all blocks of a run
    float * total;   // of all blocks of a run
} scratch;

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t scratch_floats(const problem * p, int64_t n_rows, int64_t n_run) {
    const int64_t of_block = n_rows * (STRIDE + p->dv + 1), of_run = n_run * n_rows * (p->dk + (int64_t) result_floats(p));
    return CHUNK_KV * p->dk + STRIDE * p->dv + 4 * larger(p->dk, p->dv) + of_block + of_run;
}

static scratch scratch_at(const problem * p, const plan * shares, float * at) {
    scratch s;
    s.k      = at;
    s.v      = s.k + CHUNK_KV * p->dk;
    s.scores = s.v + STRIDE * p->dv;
    s.part   = s.scores + shares->n_rows * STRIDE;
    s.buffer = s.part + shares->n_rows * p->dv;
    s.q      = s.buffer + 4 * larger(p->dk, p->dv);
    s.total  = s.q + shares->n_run * shares->n_rows * p->dk;
    s.shrink = s.total + shares->n_run * shares->n_rows * (int64_t) result_floats(p);
    return s;
}

// Only the length of runs may depend on the number of threads. False: too large, or too little to be worth it.
static bool share_out(const problem * p, plan * shares) {
    if (p->n_rows < MIN_ROWS || p->n_kv < MIN_KEYS || p->dk < MIN_WIDTH || p->dv < MIN_WIDTH ||
        p->n_rows * p->n_kv * (p->dk + p->dv) < MIN_PRODUCTS) {
        return false;
    }
    const int64_t n_heads  = p->n_head_kv * p->n_batch;
    const int64_t wanted   = smaller(MOST_ROWS, larger(LEAST_ROWS, n_heads * p->n_rows / LEAST_BLOCKS));
    const int64_t n_tokens = smaller(p->n_tokens, larger(1, wanted / p->n_group));
    shares->n_rows         = n_tokens * p->n_group;
    shares->n_blocks       = (p->n_tokens + n_tokens - 1) / n_tokens;
    shares->n_run          = larger(1, smaller(MAX_RUN, n_heads * shares->n_blocks / (RUNS_PER_THREAD * p->params->nth)));
    if (scratch_floats(p, shares->n_rows, 1) > PW_MAX_BUFFER ||
        CHUNK_KV * shares->n_rows * larger(p->dk, p->dv) > PW_MAX_PRODUCTS) {
        return false;
    }
    while (scratch_floats(p, shares->n_rows, shares->n_run) > PW_MAX_BUFFER) {
        shares->n_run--;
    }
    shares->n_runs = (shares->n_blocks + shares->n_run - 1) / shares->n_run;
    return true;
}

// Four rows of n numbers, n a multiple of four, into four columns.
static void transpose(const float * rows, int64_t n, float * out) {
    for (int64_t d = 0; d < n; d += 4, out += 4 * STRIDE) {
        const v128_t a = wasm_v128_load(rows + d), b = wasm_v128_load(rows + n + d);
        const v128_t c = wasm_v128_load(rows + 2 * n + d), e = wasm_v128_load(rows + 3 * n + d);
        const v128_t ab_low = wasm_i32x4_shuffle(a, b, 0, 4, 1, 5), ab_high = wasm_i32x4_shuffle(a, b, 2, 6, 3, 7);
        const v128_t ce_low = wasm_i32x4_shuffle(c, e, 0, 4, 1, 5), ce_high = wasm_i32x4_shuffle(c, e, 2, 6, 3, 7);
        wasm_v128_store(out, wasm_i64x2_shuffle(ab_low, ce_low, 0, 2));
        wasm_v128_store(out + STRIDE, wasm_i64x2_shuffle(ab_low, ce_low, 1, 3));
        wasm_v128_store(out + 2 * STRIDE, wasm_i64x2_shuffle(ab_high, ce_high, 0, 2));
        wasm_v128_store(out + 3 * STRIDE, wasm_i64x2_shuffle(ab_high, ce_high, 1, 3));
    }
}

// Keys and values of a range of a chunk; what is beyond the cache's end is zero.
static void load_keys(const problem * p, scratch * s, int64_t head_kv, int64_t batch, int64_t first, key_range range) {
    const int64_t last = smaller(range.last, p->n_kv - first);
    pw_flash_expand(p->k, head_kv, batch, first + range.first, last - range.first, s->k + range.first * p->dk);
    memset(s->k + last * p->dk, 0, (size_t) ((range.last - last) * p->dk) * sizeof(float));
    for (int64_t c = range.first; c < range.last; c += 4) {
        const int64_t n = larger(0, smaller(4, last - c));
        pw_flash_expand(p->v, head_kv, batch, first + c, n, s->buffer);
        memset(s->buffer + n * p->dv, 0, (size_t) ((4 - n) * p->dv) * sizeof(float));
        transpose(s->buffer, p->dv, s->v + c);
    }
}

// The scores of one row against the computed keys of a chunk, of which it sees some, to weights; *shrink is what results so far
// are to be multiplied with. `mask` is null where nothing but that range counts.
static void soften_row(const problem * p, float * scores, const ggml_fp16_t * mask, float slope, key_range seen,
                       key_range computed, float * total, float * shrink) {
    const int64_t from = seen.first / 4 * 4, to = (seen.last + 3) / 4 * 4;
    *shrink = 1.0f;
    if (seen.last == 0) {
        memset(scores + computed.first, 0, (size_t) (computed.last - computed.first) * sizeof(float));
        return;
    }
    memset(scores + computed.first, 0, (size_t) (from - computed.first) * sizeof(float));
    memset(scores + to, 0, (size_t) (computed.last - to) * sizeof(float));
    const float best    = pw_flash_mask_scores(p, scores + from, mask ? mask + from : NULL, slope, seen.last - from);
    const float largest = fmaxf(total[0], best);
    if (largest > total[0]) {
        *shrink  = total[1] == 0.0f ? 0.0f : expf(total[0] - largest);
        total[0] = largest;
    }
    total[1] = total[1] * *shrink + pw_flash_weigh(scores + from, largest, seen.last - from);
}

static void soften(const problem * p, scratch * s, const block * rows, int64_t first) {
    const int64_t       n_keys   = smaller(rows->range.last, p->n_kv - first);
    const ggml_fp16_t * known    = NULL;
    key_range           seen     = {0, n_keys};
    bool                is_plain = true;
    for (int64_t i = 0; i < rows->n_rows; i++) {
        const int64_t       row = rows->row + i, token = row / p->n_group, head = rows->head_kv * p->n_group + row % p->n_group;
        const ggml_fp16_t * mask  = p->mask ? pw_flash_row_mask(p, token, head, rows->batch) + first : NULL;
        if (mask != known) {  // most heads of a token have it in common
            known    = mask;
            seen     = pw_flash_range(mask, n_keys);
            is_plain = seen.first % 4 == 0 && pw_flash_is_plain(mask + seen.first, seen.last - seen.first);
        }
        soften_row(p, s->scores + i * STRIDE, is_plain ? NULL : mask, is_plain ? 1.0f : pw_flash_slope(p, head), seen,
                   rows->range, rows->total + i * (int64_t) result_floats(p), s->shrink + i);
    }
}

// One block against what it sees of the chunk that begins at key `first`.
static void attend(const problem * p, scratch * s, const block * rows, int64_t first) {
    const int64_t  from = rows->range.first, size = (int64_t) result_floats(p);
    const uint32_t n_keys = (uint32_t) (rows->range.last - from), n = (uint32_t) rows->n_rows;
    const uint32_t dk = (uint32_t) p->dk, dv = (uint32_t) p->dv;
    pw_safepoint();
    pw_host_sgemm(n_keys, n, dk, s->k + from * p->dk, dk, rows->q, dk, s->scores + from, STRIDE);
    soften(p, s, rows, first);
    pw_safepoint();
    pw_host_sgemm(dv, n, n_keys, s->v + from, STRIDE, s->scores + from, STRIDE, s->part, dv);
    for (int64_t i = 0; i < rows->n_rows; i++) {
        const v128_t  shrink = wasm_f32x4_splat(s->shrink[i]);
        const float * part   = s->part + i * p->dv;
        float *       to     = rows->total + i * size + 2;
        for (int64_t d = 0; d < p->dv; d += 4) {
            wasm_v128_store(to + d, wasm_f32x4_relaxed_madd(wasm_v128_load(to + d), shrink, wasm_v128_load(part + d)));
        }
    }
}

// What a block sees of the n keys of a chunk; whether it sees any.
static bool find_range(const problem * p, block * rows, int64_t first, int64_t n) {
    pw_safepoint();
    const key_range seen = pw_flash_rows_range(p, rows->head_kv, rows->batch, rows->row, rows->n_rows, first, n);
    rows->range.first    = seen.first / MULTIPLE * MULTIPLE;
    rows->range.last     = (seen.last + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
    return seen.last > 0;
}

// A run of blocks against all chunks.
static void attend_run(const problem * p, scratch * s, block * blocks, int64_t n_blocks) {
    for (int64_t first = 0; first < p->n_kv; first += CHUNK_KV) {
        const int64_t n = smaller(CHUNK_KV, p->n_kv - first);
        key_range     all = {CHUNK_KV, 0};
        for (int64_t b = 0; b < n_blocks; b++) {
            if (find_range(p, blocks + b, first, n)) {
                all.first = smaller(all.first, blocks[b].range.first);
                all.last  = larger(all.last, blocks[b].range.last);
            }
        }
        if (all.last == 0) {
            continue;
        }
        load_keys(p, s, blocks->head_kv, blocks->batch, first, all);
        for (int64_t b = 0; b < n_blocks; b++) {
            if (blocks[b].range.last > 0) {
                attend(p, s, blocks + b, first);
            }
        }
    }
    for (int64_t b = 0; b < n_blocks; b++) {
        const block * rows = blocks + b;
        for (int64_t i = 0; i < rows->n_rows; i++) {
            pw_flash_finish(p, rows->head_kv, rows->row + i, rows->batch, rows->total + i * (int64_t) result_floats(p));
        }
    }
}

// The rows of a run, loaded; returns the number of blocks.
static int64_t load_blocks(const problem * p, const plan * shares, scratch * s, int64_t head, int64_t run, block * blocks) {
    const int64_t size = (int64_t) result_floats(p);
    int64_t       n    = 0;
    for (int64_t row = run * shares->n_run * shares->n_rows; n < shares->n_run && row < p->n_rows; row += shares->n_rows, n++) {
        block * b = blocks + n;
        *b = (block) {.head_kv = head % p->n_head_kv, .batch = head / p->n_head_kv, .row = row};
        b->n_rows = smaller(shares->n_rows, p->n_rows - row);
        b->q      = s->q + n * shares->n_rows * p->dk;
        b->total  = s->total + n * shares->n_rows * size;
        pw_safepoint();
        for (int64_t i = 0; i < b->n_rows; i++) {
            pw_flash_load_query(p, b->head_kv, row + i, b->batch, b->q + i * p->dk, s->buffer);
            pw_flash_clear(p, b->total + i * size);
        }
    }
    return n;
}

// Without room for a scratch; others have begun, so it is too late to refuse.
static void attend_without(const problem * p, const plan * shares, int64_t head, int64_t run) {
    const int64_t most = shares->n_run * shares->n_rows, row = run * most;
    pw_flash_attend_rows(p, head % p->n_head_kv, head / p->n_head_kv, row, smaller(most, p->n_rows - row));
}

bool pw_flash_blas(const problem * p) {
    const struct ggml_compute_params * params = p->params;
    plan                               shares;
    if (!pw_blas_is_on() || !share_out(p, &shares)) {
        return false;
    }
    float * const buffer  = pw_blas_buffer(scratch_floats(p, shares.n_rows, shares.n_run));
    const int64_t n_heads = p->n_head_kv * p->n_batch;
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t unit = params->ith; unit < n_heads * shares.n_runs; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t head = unit % n_heads, run = shares.n_runs - 1 - unit / n_heads;  // the last tokens usually see most
        if (buffer) {
            scratch s = scratch_at(p, &shares, buffer);
            block   blocks[MAX_RUN];
            attend_run(p, &s, blocks, load_blocks(p, &shares, &s, head, run, blocks));
        } else {
            attend_without(p, &shares, head, run);
        }
    }
    return true;
}
