// Matrix products by the host's BLAS, from ggml's hook llamafile_sgemm (matmul.c): every thread of ggml takes its own rows of
// the weights, expands some of them to f32 at a time, and has the host multiply them with the activations, on that thread.
//
// ggml offers every product twice: with activations as they are, then rounded to the type that weights of that type are
// multiplied with. Only the second is taken, so that results are llama.cpp's but for the order of a sum.
//
// A host call costs some microseconds and BLAS is slow on few columns: which products are worth it stands in TYPES.
#include "blas.h"

#include "ggml-cpu.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define MAX_COLS 512                 // of activations in one call
#define MAX_ROWS 512                 // of weights in one call
#define ROW_GROUP 16                 // rows that stay together, and the fewest worth a call
#define MIN_DEPTH 64                 // of a product
#define MAX_WEIGHTS_BYTES (PW_MAX_BUFFER * (int64_t) sizeof(float))  // expanded, of each thread
#define MAX_COLS_BYTES (8 << 20)     // expanded, of each thread
#define ALIGNMENT 64
#define STRIP_ROWS 8                 // of repacked weights

typedef struct {
    int type;
    int min_cols;  // the least number of activation columns from which on BLAS is faster than our own kernels
} blas_type;

static const blas_type TYPES[] = {
    {GGML_TYPE_F32, 12},    {GGML_TYPE_F16, 24},   {GGML_TYPE_BF16, 24},   {GGML_TYPE_Q8_0, 48},  {GGML_TYPE_Q6_K, 48},
    {GGML_TYPE_Q4_0, 512}, {GGML_TYPE_Q4_1, 512}, {GGML_TYPE_Q5_0, 96},  {GGML_TYPE_Q5_1, 96},  {GGML_TYPE_IQ4_NL, 48},
    {GGML_TYPE_Q4_K, 512}, {GGML_TYPE_Q5_K, 96},  {GGML_TYPE_MXFP4, 96}, {GGML_TYPE_Q3_K, 48}, {GGML_TYPE_IQ4_XS, 48},
};
#define MIN_COLS_OF_OTHERS 32  // expanded by ggml's own to_float

static int is_blas_on;

PW_EXPORTED(pw_set_blas) void pw_set_blas(int is_on) {
    is_blas_on = is_on;
}

bool pw_blas_is_on(void) {
    return is_blas_on;
}

static int min_cols_of(int type) {
    for (size_t i = 0; i < sizeof(TYPES) / sizeof(TYPES[0]); i++) {
        if (TYPES[i].type == type) {
            return TYPES[i].min_cols;
        }
    }
    return MIN_COLS_OF_OTHERS;
}

// --- buffers of each thread's own, freed with the thread -------------------------------------------------------------------

typedef struct {
    float * data;
    size_t  size;
} buffer;

static _Thread_local buffer weights_buffer, cols_buffer;

static pthread_key_t  buffers_key;
static pthread_once_t buffers_once = PTHREAD_ONCE_INIT;

static void free_buffers(void * unused) {
    (void) unused;
    free(weights_buffer.data);
    free(cols_buffer.data);
}

static void make_buffers_key(void) {
    pthread_key_create(&buffers_key, free_buffers);
}

// Room for n numbers, or null.
static float * room(buffer * b, int64_t n) {
    const size_t size = ((size_t) n * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (b->size < size) {
        pthread_once(&buffers_once, make_buffers_key);
        pthread_setspecific(buffers_key, b);  // anything but null: then free_buffers is called
        free(b->data);
        b->data = aligned_alloc(ALIGNMENT, size);
        b->size = b->data ? size : 0;
    }
    return b->data;
}

float * pw_blas_buffer(int64_t n) {
    return room(&weights_buffer, n);
}

// --- products --------------------------------------------------------------------------------------------------------------

// Rows of blocks, which may be of single numbers.
typedef struct {
    const uint8_t * data;
    size_t          stride, block_bytes;
    int64_t         block_size;
    expand_function expand;  // null: they are f32 and read in place
    const struct strip_format * strips;  // or null: weights lie in rows
} matrix;

typedef struct {
    int64_t n, k, rows_per_call, cols_per_call;
    matrix  a, b;
    float * c;
    int64_t ldc;
} product;

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static matrix matrix_of(const void * data, int64_t stride, enum ggml_type type) {
    const size_t block_bytes = ggml_type_size(type);
    return (matrix) {data, (size_t) stride * block_bytes, block_bytes, ggml_blck_size(type),
                     type == GGML_TYPE_F32 ? NULL : pw_expand_function(type), NULL};
}

// n rows from `first` on as f32, in the buffer or in place; *stride is in numbers. A function of its own: its entry and those
// of the expansions are safepoints.
static const float * expand_rows(const matrix * x, int64_t first, int64_t n, int64_t k, buffer * into, int64_t * stride) {
    const uint8_t * row = x->data + (size_t) first * x->stride;
    if (!x->expand) {
        *stride = x->stride / sizeof(float);
        return (const float *) row;
    }
    *stride = k;
    for (int64_t i = 0; x->strips && i < n; i += STRIP_ROWS, row += STRIP_ROWS * x->stride) {
        pw_expand_strip(x->strips, row, k / x->block_size, into->data + i * k, k);
    }
    for (int64_t i = 0; !x->strips && i < n; i++, row += x->stride) {
        x->expand(row, into->data + i * k, k);
    }
    return into->data;
}

static void multiply(const product * p, int64_t first, int64_t last) {
    for (int64_t j = 0; j < p->n; j += p->cols_per_call) {
        int64_t       lda, ldb;
        const int64_t n_cols = smaller(p->cols_per_call, p->n - j);
        const float * cols   = expand_rows(&p->b, j, n_cols, p->k, &cols_buffer, &ldb);
        for (int64_t i = first; i < last; i += p->rows_per_call) {
            const int64_t n_rows = smaller(p->rows_per_call, last - i);
            const float * rows   = expand_rows(&p->a, i, n_rows, p->k, &weights_buffer, &lda);
            pw_safepoint();
            pw_host_sgemm(n_rows, n_cols, p->k, rows, lda, cols, ldb, p->c + j * p->ldc + i, p->ldc);
        }
    }
}

// Where there is no room for the buffers: block by block, slowly. Other threads have begun, so it is too late to refuse.
#define MAX_BLOCK 256

static const float * expand_block(const matrix * x, int64_t row, int64_t l, int64_t n, float * into) {
    if (x->strips) {
        float rows[STRIP_ROWS][MAX_BLOCK];
        const uint8_t * strip = x->data + (size_t) (row - row % STRIP_ROWS) * x->stride;
        pw_expand_strip(x->strips, strip + (size_t) (l / x->block_size) * x->block_bytes, n / x->block_size, rows[0], MAX_BLOCK);
        memcpy(into, rows[row % STRIP_ROWS], (size_t) n * sizeof(float));
        return into;
    }
    const uint8_t * blocks = x->data + (size_t) row * x->stride + (size_t) (l / x->block_size) * x->block_bytes;
    if (!x->expand) {
        return (const float *) blocks;
    }
    x->expand(blocks, into, n);
    return into;
}

static void multiply_without_buffers(const product * p, int64_t first, int64_t last) {
    float a[MAX_BLOCK], b[MAX_BLOCK];
    for (int64_t i = first; i < last; i++) {
        for (int64_t j = 0; j < p->n; j++) {
            float sum = 0.0f;
            pw_safepoint();
            for (int64_t l = 0; l < p->k; l += MAX_BLOCK) {
                const int64_t n = smaller(MAX_BLOCK, p->k - l);
                const float * x = expand_block(&p->a, i, l, n, a), * y = expand_block(&p->b, j, l, n, b);
                for (int64_t w = 0; w < n; w++) {
                    sum += x[w] * y[w];
                }
            }
            p->c[j * p->ldc + i] = sum;
        }
    }
}

// How much to have multiplied at a time; false where a call would be too small to be worth it.
static bool plan(product * p) {
    const int64_t row_bytes = p->k * (int64_t) sizeof(float);
    p->cols_per_call = smaller(p->n, MAX_COLS);
    if (p->b.expand) {
        p->cols_per_call = smaller(p->cols_per_call, MAX_COLS_BYTES / row_bytes);
    }
    if (p->cols_per_call < smaller(p->n, ROW_GROUP)) {
        return false;
    }
    p->rows_per_call = smaller(MAX_ROWS, PW_MAX_PRODUCTS / (p->cols_per_call * p->k));
    if (p->a.expand) {
        p->rows_per_call = smaller(p->rows_per_call, MAX_WEIGHTS_BYTES / row_bytes);
    }
    p->rows_per_call = p->rows_per_call / ROW_GROUP * ROW_GROUP;
    return p->rows_per_call > 0;
}

// Whether the host takes it without expansion: a file may lay its weights anywhere, and rows of a view may overlap.
static bool is_readable_in_place(const matrix * x, int64_t k) {
    return x->expand || ((uintptr_t) x->data % sizeof(float) == 0 && x->stride >= (size_t) k * sizeof(float));
}

// Every thread's part of a product that is one for BLAS.
static bool run(const struct ggml_compute_params * params, int64_t m, product * p, int min_cols) {
    if (!is_blas_on || p->n < min_cols || m < ROW_GROUP * params->nth || p->k < MIN_DEPTH || !plan(p)) {
        return false;
    }
    // whole groups of rows, which BLAS's own tiles are made of
    const int64_t n_groups = (m + ROW_GROUP - 1) / ROW_GROUP;
    const int64_t first = ROW_GROUP * (n_groups * params->ith / params->nth);
    const int64_t last = smaller(m, ROW_GROUP * (n_groups * (params->ith + 1) / params->nth));
    if ((p->a.expand && !room(&weights_buffer, smaller(p->rows_per_call, last - first) * p->k)) ||
        (p->b.expand && !room(&cols_buffer, p->cols_per_call * p->k))) {
        multiply_without_buffers(p, first, last);
    } else {
        multiply(p, first, last);
    }
    return true;
}

bool pw_blas_multiply(const struct ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * A, int64_t lda,
                      const void * B, int64_t ldb, void * C, int64_t ldc, int a_type, int b_type, int c_type) {
    const enum ggml_type a = (enum ggml_type) a_type, b = (enum ggml_type) b_type;
    if (!is_blas_on || n < min_cols_of(a_type) || c_type != GGML_TYPE_F32 || b != ggml_get_type_traits_cpu(a)->vec_dot_type) {
        return false;
    }
    product p = {.n = n, .k = k * ggml_blck_size(a), .a = matrix_of(A, lda, a), .b = matrix_of(B, ldb, b), .c = C, .ldc = ldc};
    if ((a != GGML_TYPE_F32 && !p.a.expand) || (b != GGML_TYPE_F32 && !p.b.expand)) {
        return false;
    }
    if (!is_readable_in_place(&p.a, p.k) || !is_readable_in_place(&p.b, p.k) || ldc < m) {
        return false;
    }
    return run(params, m, &p, min_cols_of(a_type));
}

bool pw_blas_multiply_strips(const struct ggml_compute_params * params, const struct strip_format * format, int64_t m, int64_t n,
                             int64_t k, const uint8_t * a, size_t a_stride, const uint8_t * b, float * c, int64_t ldc) {
    enum ggml_type type, y_type;
    pw_strip_types(format, &type, &y_type);
    product p = {.n = n, .k = k, .b = matrix_of(b, k / ggml_blck_size(y_type), y_type), .c = c, .ldc = ldc};
    p.a = (matrix) {a, a_stride, STRIP_ROWS * a_stride / (size_t) (k / ggml_blck_size(type)), ggml_blck_size(type),
                    pw_expand_function(type), format};
    return run(params, m, &p, min_cols_of(type));
}
