// Matrix products with repacked weights (strips.h): activations are quantized as ggml does it, up to three columns are
// multiplied strip by strip, more go through the same tiles, and the same BLAS, as weights that were not repacked.
#include "strips.h"

#define GGML_COMMON_DECL_C
#include "blas.h"
#include "ggml-common.h"
#include "ggml-cpu.h"

#define MIN_TILE_COLS 4
#define MAX_BYTES ((size_t) 3 << 30)  // of a matrix: a strip may be some percent larger than its rows
#define ALL_COLUMNS 65536  // bytes of activations, on the stack

static const strip_format * const FORMATS[] = {
    &pw_strip_q4_0, &pw_strip_q4_1, &pw_strip_q5_0, &pw_strip_q5_1, &pw_strip_q4_K, &pw_strip_q5_K, &pw_strip_q6_K,
};

const strip_format * pw_strip_format(const struct ggml_tensor * weights) {
    if (weights->ne[0] == 0 || weights->ne[1] == 0 || weights->ne[1] % STRIP_ROWS || weights->ne[2] != 1 || weights->ne[3] != 1 ||
        weights->view_src || !ggml_is_contiguous(weights)) {
        return NULL;
    }
    for (size_t i = 0; i < sizeof(FORMATS) / sizeof(FORMATS[0]); i++) {
        if (FORMATS[i]->type == weights->type && ggml_nbytes(weights) <= MAX_BYTES) {
            return FORMATS[i];
        }
    }
    return NULL;
}

static int64_t blocks_of_row(const strip_format * format, const struct ggml_tensor * weights) {
    return weights->ne[0] / ggml_blck_size(format->type);
}

size_t pw_strip_bytes(const strip_format * format, const struct ggml_tensor * weights) {
    return (size_t) (weights->ne[1] / STRIP_ROWS) * (size_t) blocks_of_row(format, weights) * format->record_bytes;
}

// A function of its own: its entry is a safepoint.
static __attribute__((noinline)) void weave_strip(const strip_format * format, int64_t n, uint8_t * strip, uint8_t * rows, bool is_weaving) {
    const size_t block_bytes = ggml_type_size(format->type);
    uint8_t *    x[STRIP_ROWS];
    for (int r = 0; r < STRIP_ROWS; r++) {
        x[r] = rows + (size_t) r * (size_t) n * block_bytes;
    }
    for (int64_t b = 0; b < n; b++, strip += format->record_bytes) {
        format->weave(strip, x, is_weaving);
        for (int r = 0; r < STRIP_ROWS; r++) {
            x[r] += block_bytes;
        }
    }
}

void pw_weave(const strip_format * format, const struct ggml_tensor * weights, uint8_t * strips, uint8_t * rows, bool is_weaving) {
    const int64_t n = blocks_of_row(format, weights);
    for (int64_t row = 0; row < weights->ne[1]; row += STRIP_ROWS) {
        weave_strip(format, n, strips, rows, is_weaving);
        strips += (size_t) n * format->record_bytes;
        rows += STRIP_ROWS * (size_t) n * ggml_type_size(format->type);
    }
}

// --- products ----------------------------------------------------------------------------------------------------------------

size_t pw_strip_work_bytes(const struct ggml_tensor * dst) {
    const strip_format * format = pw_strip_format(dst->src[0]);
    return ggml_row_size(format->activations, dst->src[1]->ne[0]) * (size_t) ggml_nrows(dst->src[1]);
}

// All rows of activations into the work buffer; every thread takes its blocks of each.
static void quantize_activations(const struct ggml_compute_params * params, const struct ggml_tensor * y, enum ggml_type type) {
    const struct ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(type);
    const int64_t size = ggml_blck_size(type), n_blocks = y->ne[0] / size;
    const int64_t first = n_blocks * params->ith / params->nth, last = n_blocks * (params->ith + 1) / params->nth;
    const size_t  row_bytes = ggml_row_size(type, y->ne[0]), skipped = (size_t) first * ggml_type_size(type);
    char *        out = params->wdata;
    for (int64_t i3 = 0; i3 < y->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < y->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < y->ne[1]; i1++, out += row_bytes) {
                const char * row = (const char *) y->data + i1 * y->nb[1] + i2 * y->nb[2] + i3 * y->nb[3];
                traits->from_float((const float *) row + first * size, out + skipped, (last - first) * size);
            }
        }
    }
}

// Blocks `block` to `block + n` of every column.
static void set_columns(const strip_format * format, const product * p, int64_t block, int64_t n, v128_t * out) {
    const size_t bytes = ggml_type_size(format->activations);
    for (int64_t j = 0; j < p->n; j++) {
        const uint8_t * y = p->b + (size_t) j * p->b_stride + (size_t) block * bytes;
        for (int64_t i = 0; i < n; i++, y += bytes, out += format->column_vectors) {
            format->set_column(y, out);
        }
    }
}

// One strip with all columns. A function of its own: its entry is a safepoint.
static __attribute__((noinline)) void multiply_strip(const strip_format * format, const product * p, int64_t row, int64_t block, int64_t n,
                                                     const v128_t * columns) {
    const uint8_t * x = p->a + (size_t) row * p->a_stride + (size_t) block * format->record_bytes;
    for (int64_t j = 0; j < p->n; j++, columns += n * (int64_t) format->column_vectors) {
        float * c = p->c + j * p->ldc + row;
        v128_t  acc[N_GROUPS] = {wasm_f32x4_splat(0.0f), wasm_f32x4_splat(0.0f)};
        if (block > 0) {
            acc[0] = wasm_v128_load(c);
            acc[1] = wasm_v128_load(c + N_ROWS);
        }
        format->multiply(n, x, columns, acc);
        wasm_v128_store(c, acc[0]);
        wasm_v128_store(c + N_ROWS, acc[1]);
    }
}

static void multiply_columns(const strip_format * format, const struct ggml_compute_params * params, const product * p) {
    _Alignas(16) v128_t columns[ALL_COLUMNS / sizeof(v128_t)];
    const int64_t max_blocks = ALL_COLUMNS / (int64_t) (format->column_vectors * sizeof(v128_t)) / p->n;
    for (int64_t block = 0; block < p->k; block += max_blocks) {
        const int64_t n = p->k - block < max_blocks ? p->k - block : max_blocks;
        set_columns(format, p, block, n, columns);
        row_shares shares = pw_row_shares(params, p, p->k <= max_blocks);
        int64_t    first, last;
        while (pw_next_share(&shares, &first, &last)) {
            for (int64_t row = N_ROWS * first; row < N_ROWS * last; row += STRIP_ROWS) {
                multiply_strip(format, p, row, block, n, columns);
            }
        }
    }
}

void pw_multiply_strips(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * weights = dst->src[0], * y = dst->src[1];
    const strip_format *       format  = pw_strip_format(weights);
    GGML_ASSERT(format && y->type == GGML_TYPE_F32 && y->nb[0] == sizeof(float) && ggml_is_contiguous(dst));
    quantize_activations(params, y, format->activations);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);  // shares of rows, see matmul.c
    }
    ggml_barrier(params->threadpool);
    const product p = {
        .m = weights->ne[1], .n = ggml_nrows(y), .k = blocks_of_row(format, weights), .a = weights->data, .b = params->wdata,
        .c = dst->data, .ldc = dst->ne[0], .a_stride = (size_t) blocks_of_row(format, weights) * format->record_bytes / STRIP_ROWS,
        .b_stride = ggml_row_size(format->activations, y->ne[0]), .a_type = weights->type, .b_type = format->activations,
    };
    const bool is_done = pw_blas_multiply_strips(params, format, p.m, p.n, weights->ne[0], p.a, p.a_stride, p.b, p.c, p.ldc);
    if (is_done) {
        return;
    }
    if (p.n >= MIN_TILE_COLS) {
        pw_multiply_tiles(format->tiles, params, &p);
    } else {
        multiply_columns(format, params, &p);
    }
}

void pw_strip_types(const strip_format * format, enum ggml_type * weights, enum ggml_type * activations) {
    *weights     = format->type;
    *activations = format->activations;
}
