// What the three ways through flash attention share: flash_attn.c, for any cache, flash_halves.c, for few rows over a cache in
// half precision, and flash_blas.c, for many rows.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml.h"
#include "rows.h"

#include <math.h>

void pw_safepoint(void);  // sysroot/stop.c

// Keys are taken in parts, whose results are put together in order: a row comes out the same whatever the number of threads.
#define PART_KV 128

typedef struct {
    const struct ggml_compute_params * params;
    struct ggml_tensor *               dst;
    const struct ggml_tensor *         q, *k, *v, *mask, *sinks;
    int64_t                            dk, dv, n_tokens, n_kv, n_head, n_group, n_head_kv, n_batch;
    int64_t                            n_rows;   // per KV head: n_tokens * n_group
    float                              scale, max_bias, softcap;
} problem;

// Few rows over a cache in half precision (flash_halves.c); false: not a case for it, and nothing was done.
bool pw_flash_halves(const problem * p);
// Many rows, by the host's BLAS (flash_blas.c); false: not a case for it, which every thread answers alike; nothing was done.
bool pw_flash_blas(const problem * p);
// Any rows of one KV head, by this thread alone and in its part of the work buffer (flash_attn.c).
void pw_flash_attend_rows(const problem * p, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows);
// n rows of K or V, starting at `first`, as f32 (flash_attn.c).
void pw_flash_expand(const struct ggml_tensor * t, int64_t head, int64_t batch, int64_t first, int64_t n, float * out);

// The following: flash_scores.c. Of keys in a row those from `first` to before `last`; last 0: none.
typedef struct {
    int64_t first, last;
} key_range;

// A row of the mask, and how much of it counts for this head (ALiBi).
const ggml_fp16_t * pw_flash_row_mask(const problem * p, int64_t token, int64_t head, int64_t batch);
float pw_flash_slope(const problem * p, int64_t head);
// The first and the last key that a row of the mask lets through; there may be hidden ones between them.
key_range pw_flash_range(const ggml_fp16_t * mask, int64_t n);
// Whether these are all visible, and nothing is added to their scores.
bool pw_flash_is_plain(const ggml_fp16_t * mask, int64_t n);
// The last key that any row of this batch entry sees, plus one: caches are allocated far beyond what is in use.
int64_t pw_flash_used(const problem * p, int64_t batch);
// Of the keys first .. first + n those between the first and the last that any of the rows sees, counted from `first`.
key_range pw_flash_rows_range(const problem * p, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows, int64_t first,
                              int64_t n);
// Whether any of the rows sees any of the keys first .. first + n.
bool pw_flash_is_visible(const problem * p, int64_t head_kv, int64_t batch, int64_t row0, int64_t n_rows, int64_t first,
                         int64_t n);
// A query (dk), rounded and scaled; `buffer` has room for dk floats.
void pw_flash_load_query(const problem * p, int64_t head_kv, int64_t row, int64_t batch, float * q, void * buffer);
// Scores to masked scores, up to the next multiple of four; returns the largest. Without a mask all are visible.
float pw_flash_mask_scores(const problem * p, float * scores, const ggml_fp16_t * mask, float slope, int64_t n);
// The same with the mask of that row.
float pw_flash_mask(const problem * p, float * scores, int64_t head_kv, int64_t row, int64_t batch, int64_t first, int64_t n);
// Masked scores to weights; returns their sum.
float pw_flash_weigh(float * scores, float largest, int64_t n);
// The result of a row over some of the keys: {largest score, sum of the weights, output[dv]}, the output not yet divided.
static inline size_t result_floats(const problem * p) {
    return (size_t) (2 + p->dv);
}
void pw_flash_clear(const problem * p, float * total);
void pw_flash_merge(const problem * p, float * total, const float * part);
// Divides and stores.
void pw_flash_finish(const problem * p, int64_t head_kv, int64_t row, int64_t batch, const float * total);

static inline int64_t n_parts(int64_t used) {
    return (used + PART_KV - 1) / PART_KV;
}

// The sums of a, b, c and d, one in each lane.
static inline v128_t sum_each_f32(v128_t a, v128_t b, v128_t c, v128_t d) {
    const v128_t ab = wasm_f32x4_add(wasm_i32x4_shuffle(a, b, 0, 2, 4, 6), wasm_i32x4_shuffle(a, b, 1, 3, 5, 7));
    const v128_t cd = wasm_f32x4_add(wasm_i32x4_shuffle(c, d, 0, 2, 4, 6), wasm_i32x4_shuffle(c, d, 1, 3, 5, 7));
    return wasm_f32x4_add(wasm_i32x4_shuffle(ab, cd, 0, 2, 4, 6), wasm_i32x4_shuffle(ab, cd, 1, 3, 5, 7));
}
