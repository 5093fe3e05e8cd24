// Mixtures of experts: the products of one expert's weights with the tokens that were routed to it, by the same kernels as every
// other matrix product. ggml-cpu.c has quantized the activations and sorted tokens by expert, and asks here, from every
// thread and expert after expert, before it would take one dot product after another.
//
//   src0 (k, m, n_expert)   src1 (k, n_used or 1, n_tokens)   dst (m, n_used, n_tokens) f32
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "tiles.h"
#include "tiled/tiled.h"  // upstream's hook for this, whose own kernels are for x86

#include <string.h>

// What one product takes: activations are gathered into a block of as many columns, results are spread again.
#define MAX_COLS   32
#define CHUNK_ROWS 64

// Room in the work buffer for the gathered columns of every thread.
static size_t gathered_bytes(const struct ggml_tensor * dst) {
    const enum ggml_type type = ggml_get_type_traits_cpu(dst->src[0]->type)->vec_dot_type;
    const uint64_t bytes = (uint64_t) MAX_COLS * ggml_row_size(type, dst->src[1]->ne[0]);
    GGML_ASSERT(bytes < 1u << 28);  // rows of a million values and more would wrap the sum over all threads
    return ((size_t) bytes + 63) / 64 * 64;
}

size_t ggml_tiled_wdata_size(int n_tasks, struct ggml_tensor * dst) {
    return dst->op == GGML_OP_MUL_MAT_ID ? 64 + (size_t) n_tasks * gathered_bytes(dst) : 0;
}

typedef struct {
    struct ggml_compute_params alone;  // one thread's part is a whole product
    struct ggml_tensor *       dst;
    enum ggml_type             type, y_type;
    int64_t                    k, m;   // values of a row, rows
    const char *               weights;
    const char *               activations;
    size_t                     token_bytes, slot_bytes;  // from one row of activations to the next
    const int32_t *            slots;  // pairs of (place among the token's experts, token)
} expert;

static expert read_expert(const struct ggml_compute_params * params, struct ggml_tensor * dst, int64_t i, const int32_t * slots) {
    const struct ggml_tensor * w = dst->src[0];
    const struct ggml_tensor * y = dst->src[1];
    expert e = {.alone = *params, .dst = dst, .type = w->type, .k = w->ne[0], .m = w->ne[1], .slots = slots};
    e.alone.ith   = 0;
    e.alone.nth   = 1;
    e.y_type      = ggml_get_type_traits_cpu(w->type)->vec_dot_type;
    e.weights     = (const char *) w->data + i * w->nb[2];
    e.activations = y->type == e.y_type ? y->data : params->wdata;
    // quantized or contiguous rows lie one after another
    const bool is_packed = y->type != e.y_type || ggml_is_contiguous(y);
    e.slot_bytes  = is_packed ? ggml_row_size(e.y_type, e.k) : y->nb[1];
    e.token_bytes = is_packed ? e.slot_bytes * (size_t) y->ne[1] : y->nb[2];
    return e;
}

static const char * activations_of(const expert * e, int64_t col) {
    const int32_t slot = e->slots[2 * col], token = e->slots[2 * col + 1];
    return e->activations + (size_t) (slot % e->dst->src[1]->ne[1]) * e->slot_bytes + (size_t) token * e->token_bytes;
}

static float * results_of(const expert * e, int64_t col) {
    return (float *) ((char *) e->dst->data + e->slots[2 * col] * e->dst->nb[1] + e->slots[2 * col + 1] * e->dst->nb[2]);
}

// n rows of weights from `row` on against n_cols columns that lie one after another at y; column j of the results at
// c + j * ldc.
static bool multiply(const expert * e, int64_t row, int64_t n, const char * y, int64_t n_cols, float * c, int64_t ldc) {
    const struct ggml_tensor * w = e->dst->src[0];
    const product p = {
        .m = n, .n = n_cols, .k = e->k / ggml_blck_size(e->type), .a = (const uint8_t *) e->weights + (size_t) row * w->nb[1],
        .b = (const uint8_t *) y, .c = c, .a_stride = w->nb[1], .b_stride = ggml_row_size(e->y_type, e->k), .ldc = ldc,
        .a_type = e->type, .b_type = e->y_type,
    };
    return pw_multiply(&e->alone, &p);
}

// Rows first .. last for the n_cols columns from `col` on.
static void multiply_cols(const expert * e, int64_t first, int64_t last, int64_t col, int64_t n_cols, char * gathered) {
    const size_t row_bytes = ggml_row_size(e->y_type, e->k);
    float        results[MAX_COLS][CHUNK_ROWS];
    for (int64_t j = 0; j < n_cols; j++) {
        memcpy(gathered + (size_t) j * row_bytes, activations_of(e, col + j), row_bytes);
    }
    for (int64_t row = first; row < last; row += CHUNK_ROWS) {
        const int64_t n = last - row < CHUNK_ROWS ? last - row : CHUNK_ROWS;
        multiply(e, row, n, gathered, n_cols, results[0], CHUNK_ROWS);
        for (int64_t j = 0; j < n_cols; j++) {
            memcpy(results_of(e, col + j) + row, results[j], (size_t) n * sizeof(float));
        }
    }
}

// False: not ours, which every thread answers alike.
bool ggml_compute_forward_mul_mat_id_tiled(const struct ggml_compute_params * params, struct ggml_tensor * dst, int64_t cur_a,
                                           int64_t cne1, const int32_t * expert_rows, char * scratch) {
    const expert e = read_expert(params, dst, cur_a, expert_rows);
    if (params->use_ref || !multiply(&e, 0, 0, e.activations, 1, dst->data, e.m)) {
        return false;
    }
    const int64_t n_groups = (e.m + 3) / 4;
    const int64_t first = 4 * (n_groups * params->ith / params->nth), end = 4 * (n_groups * (params->ith + 1) / params->nth);
    const int64_t last = end < e.m ? end : e.m;
    if (first >= last) {
        return true;
    }
    if (cne1 == 1) {
        multiply(&e, first, last - first, activations_of(&e, 0), 1, results_of(&e, 0) + first, e.m);
        return true;
    }
    char * gathered = scratch + (size_t) params->ith * gathered_bytes(dst);
    for (int64_t col = 0; col < cne1; col += MAX_COLS) {
        multiply_cols(&e, first, last, col, cne1 - col < MAX_COLS ? cne1 - col : MAX_COLS, gathered);
    }
    return true;
}
