// Matrix products by the host's BLAS, from ggml's hook llamafile_sgemm (matmul.c): every thread of ggml takes its own rows of
// the weights, expands some of them to f32 at a time, and has the host multiply them with the activations, on that thread.
//
// ggml offers every product twice: with activations as they are, then rounded to the type that weights of that type are
// multiplied with. Only the second is taken, so that results are llama.cpp's but for the order of a sum.
//
// A host call costs some microseconds and BLAS is slow on few columns: which products are worth it stands in TYPES. Where BLAS
// reads factors as they lie (SLICES) it is fast on few columns too, and what is expanded for one call stays in the second-level
// cache until it is read.
#include "blas.h"

#include "ggml-cpu.h"
#include "strips.h"

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
#define PADDING 16                   // numbers between expanded rows, which so do not lie on each other in the cache
#define DEPTH 1024                   // of a part of a long product, in whole blocks of any type
#define MIN_SHARE_ROWS 96            // that a thread takes at a time

// For BLAS that reads factors as they lie: what one call expands.
#define SLICES_WEIGHTS_BYTES (512 << 10)

// The least number of activation columns from which on BLAS is faster than our own kernels, on one thread.
typedef struct {
    int type;
    int whole, sliced, sliced_strips;  // as is, in slices, in slices with repacked weights
} min_cols;

static const min_cols TYPES[] = {
    {GGML_TYPE_F32, 12, 4, 0},        {GGML_TYPE_F16, 24, 16, 0},       {GGML_TYPE_BF16, 24, 16, 0},
    {GGML_TYPE_Q8_0, 48, 36, 0},      {GGML_TYPE_IQ4_NL, 48, 40, 0},    {GGML_TYPE_Q3_K, 48, 28, 0},
    {GGML_TYPE_IQ4_XS, 56, 56, 0},    {GGML_TYPE_MXFP4, 96, 64, 0},     {GGML_TYPE_Q6_K, 48, 28, 256},
    {GGML_TYPE_Q4_0, 512, 512, 1024}, {GGML_TYPE_Q4_1, 512, 512, 512},  {GGML_TYPE_Q4_K, 512, 112, 1024},
    {GGML_TYPE_Q5_0, 112, 112, 192},  {GGML_TYPE_Q5_1, 96, 56, 96},     {GGML_TYPE_Q5_K, 96, 60, 192},
};
#define MIN_COLS_OF_OTHERS 28  // expanded by ggml's own to_float

// Threads that call the host in turn hand each other the lock of its interpreter, which takes some 50 microseconds: slices win
// later, measured at 1.5 to 2.4 times the columns.
#define WITH_OTHERS(n) ((n) * 7 / 4)

static int blas_kind;

PW_EXPORTED(pw_set_blas) void pw_set_blas(int kind) {
    blas_kind = kind;
}

bool pw_blas_is_on(void) {
    return blas_kind != BLAS_OFF;
}

static int min_cols_of(int type, bool is_strips, int n_threads) {
    int least = MIN_COLS_OF_OTHERS;
    for (size_t i = 0; i < sizeof(TYPES) / sizeof(TYPES[0]); i++) {
        const min_cols * found = &TYPES[i];
        if (found->type == type) {
            least = blas_kind != BLAS_SLICES ? found->whole : is_strips ? found->sliced_strips : found->sliced;
        }
    }
    return blas_kind == BLAS_SLICES && n_threads > 1 ? WITH_OTHERS(least) : least;
}

// --- buffers of each thread's own, freed with the thread -------------------------------------------------------------------

typedef struct {
    float * data;
    size_t  size;
} buffer;

static _Thread_local buffer weights_buffer, cols_buffer, sums_buffer;

static pthread_key_t  buffers_key;
static pthread_once_t buffers_once = PTHREAD_ONCE_INIT;

static void free_buffers(void * unused) {
    (void) unused;
    free(weights_buffer.data);
    free(cols_buffer.data);
    free(sums_buffer.data);
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
    int64_t m, n, k, rows_per_call, cols_per_call, depth_per_call;
    matrix  a, b;
    float * c;
    int64_t ldc;
} blas_product;

// Rows of numbers, `stride` apart.
typedef struct {
    const float * at;
    int64_t       stride;
} numbers;

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static matrix matrix_of(const void * data, int64_t stride, enum ggml_type type) {
    const size_t block_bytes = ggml_type_size(type);
    return (matrix) {data, (size_t) stride * block_bytes, block_bytes, ggml_blck_size(type),
                     type == GGML_TYPE_F32 ? NULL : pw_expand_function(type), NULL};
}

// Numbers l to l + k of n rows from `first` on as f32, where `into` points or in place. A function of its own: its entry and
// those of the expansions are safepoints.
static numbers expand_rows(const matrix * x, int64_t first, int64_t n, int64_t l, int64_t k, float * into) {
    const uint8_t * row    = x->data + (size_t) first * x->stride + (size_t) (l / x->block_size) * x->block_bytes;
    const int64_t   stride = k + PADDING;
    if (!x->expand) {
        return (numbers) {(const float *) row, (int64_t) (x->stride / sizeof(float))};
    }
    for (int64_t i = 0; x->strips && i < n; i += STRIP_ROWS, row += STRIP_ROWS * x->stride) {
        pw_expand_strip(x->strips, row, k / x->block_size, into + i * stride, stride);
    }
    for (int64_t i = 0; !x->strips && i < n; i++, row += x->stride) {
        x->expand(row, into + i * stride, k);
    }
    return (numbers) {into, stride};
}

// The room that one part of the depth takes of n columns.
static int64_t part_room(const blas_product * p, int64_t n) {
    return n * (p->depth_per_call + PADDING);
}

// Columns `first` to `first + n`, part behind part of the depth.
static void expand_columns(const blas_product * p, int64_t first, int64_t n) {
    float * into = cols_buffer.data;
    for (int64_t l = 0; l < p->k && p->b.expand; l += p->depth_per_call, into += part_room(p, n)) {
        expand_rows(&p->b, first, n, l, smaller(p->depth_per_call, p->k - l), into);
    }
}

// One part of these columns, or of columns that are read in place.
static numbers columns_of(const blas_product * p, int64_t first, int64_t n, int64_t l, int64_t depth) {
    if (!p->b.expand) {
        return expand_rows(&p->b, first, n, l, depth, NULL);
    }
    return (numbers) {cols_buffer.data + l / p->depth_per_call * part_room(p, n), depth + PADDING};
}

// c += sums, n columns of m. A function of its own: its entry is a safepoint.
static __attribute__((noinline)) void add_sums(float * c, int64_t ldc, const float * sums, int64_t m, int64_t n) {
    for (int64_t j = 0; j < n; j++, c += ldc, sums += m) {
        for (int64_t i = 0; i < m; i++) {
            c[i] += sums[i];
        }
    }
}

// Rows `first` to `last` times columns j to j + n, which are expanded: part of the depth by part.
static void multiply_rows(const blas_product * p, int64_t first, int64_t last, int64_t j, int64_t n) {
    const int64_t n_calls = (last - first + p->rows_per_call - 1) / p->rows_per_call;
    const int64_t n_rows  = ((last - first + n_calls - 1) / n_calls + ROW_GROUP - 1) / ROW_GROUP * ROW_GROUP;
    for (int64_t i = first; i < last; i += n_rows) {
        float *       c = p->c + j * p->ldc + i;
        const int64_t m = smaller(n_rows, last - i);
        for (int64_t l = 0; l < p->k; l += p->depth_per_call) {
            const int64_t depth = smaller(p->depth_per_call, p->k - l);
            const numbers rows  = expand_rows(&p->a, i, m, l, depth, weights_buffer.data);
            const numbers columns = columns_of(p, j, n, l, depth);
            const bool    is_first = l == 0;
            pw_safepoint();
            pw_host_sgemm(m, n, depth, rows.at, rows.stride, columns.at, columns.stride, is_first ? c : sums_buffer.data,
                          is_first ? p->ldc : m);
            if (!is_first) {
                add_sums(c, p->ldc, sums_buffer.data, m, n);
            }
        }
    }
}

// This thread's shares. Activations are expanded once for all of them.
static void multiply(const blas_product * p, row_shares shares) {
    for (int64_t j = 0; j < p->n; j += p->cols_per_call) {
        const int64_t n = smaller(p->cols_per_call, p->n - j);
        row_shares    left = shares;
        int64_t       first, last;
        expand_columns(p, j, n);
        while (pw_next_share(&left, &first, &last)) {
            multiply_rows(p, N_ROWS * first, smaller(p->m, N_ROWS * last), j, n);
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

static void multiply_without_buffers(const blas_product * p, int64_t first, int64_t last) {
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
static bool plan(blas_product * p) {
    const bool    is_sliced = blas_kind == BLAS_SLICES;
    const int64_t n_parts   = is_sliced && p->k > DEPTH * 3 / 2 ? (p->k + DEPTH / 2) / DEPTH : 1;
    p->depth_per_call = n_parts == 1 ? p->k : ((p->k + n_parts - 1) / n_parts + MAX_BLOCK - 1) / MAX_BLOCK * MAX_BLOCK;
    const int64_t row_bytes = (p->depth_per_call + PADDING) * (int64_t) sizeof(float);
    const int64_t all_parts = (p->k + p->depth_per_call - 1) / p->depth_per_call * row_bytes;
    p->cols_per_call = smaller(smaller(p->n, MAX_COLS), PW_MAX_ELEMENTS / p->depth_per_call);
    if (p->b.expand) {
        p->cols_per_call = smaller(p->cols_per_call, MAX_COLS_BYTES / all_parts);
    }
    if (p->cols_per_call < smaller(p->n, ROW_GROUP)) {
        return false;
    }
    p->rows_per_call = smaller(MAX_ROWS, PW_MAX_PRODUCTS / (p->cols_per_call * p->depth_per_call));
    p->rows_per_call = smaller(p->rows_per_call, PW_MAX_ELEMENTS / p->depth_per_call);
    if (p->a.expand) {
        p->rows_per_call = smaller(p->rows_per_call, (is_sliced ? SLICES_WEIGHTS_BYTES : MAX_WEIGHTS_BYTES) / row_bytes);
    }
    p->rows_per_call = p->rows_per_call / ROW_GROUP * ROW_GROUP;
    return p->rows_per_call > 0;
}

// Whether the host takes it without expansion: a file may lay its weights anywhere, and rows of a view may overlap.
static bool is_readable_in_place(const matrix * x, int64_t k) {
    return x->expand || ((uintptr_t) x->data % sizeof(float) == 0 && x->stride >= (size_t) k * sizeof(float));
}

// Shares of rows as for our own kernels (matmul.c), but not too small for a call.
static row_shares shares_of(const struct ggml_compute_params * params, const blas_product * p) {
    const product same = {.m = p->m, .b = p->b.data};
    row_shares    shares = pw_row_shares(params, &same, p->cols_per_call == p->n);
    if (shares.pool) {
        const int64_t most = p->m / MIN_SHARE_ROWS;
        shares.n_shares = smaller(shares.n_shares, most > params->nth ? most : params->nth);
    }
    return shares;
}

static bool has_room(const blas_product * p) {
    const int64_t n_parts = (p->k + p->depth_per_call - 1) / p->depth_per_call;
    return (!p->a.expand || room(&weights_buffer, p->rows_per_call * (p->depth_per_call + PADDING))) &&
           (!p->b.expand || room(&cols_buffer, n_parts * part_room(p, p->cols_per_call))) &&
           (n_parts == 1 || room(&sums_buffer, p->rows_per_call * p->cols_per_call));
}

// Every thread's part of a product that is one for BLAS.
static bool run(const struct ggml_compute_params * params, blas_product * p, int least) {
    if (!pw_blas_is_on() || p->n < least || p->m < ROW_GROUP * params->nth || p->k < MIN_DEPTH || !plan(p)) {
        return false;
    }
    row_shares shares = shares_of(params, p);
    if (has_room(p)) {
        multiply(p, shares);
        return true;
    }
    for (int64_t first, last; pw_next_share(&shares, &first, &last);) {
        multiply_without_buffers(p, N_ROWS * first, smaller(p->m, N_ROWS * last));
    }
    return true;
}

bool pw_blas_multiply(const struct ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * A, int64_t lda,
                      const void * B, int64_t ldb, void * C, int64_t ldc, int a_type, int b_type, int c_type) {
    const enum ggml_type a = (enum ggml_type) a_type, b = (enum ggml_type) b_type;
    if (!pw_blas_is_on() || n < min_cols_of(a_type, false, params->nth) || c_type != GGML_TYPE_F32 || b != ggml_get_type_traits_cpu(a)->vec_dot_type) {
        return false;
    }
    blas_product p = {.m = m, .n = n, .k = k * ggml_blck_size(a), .c = C, .ldc = ldc};
    p.a = matrix_of(A, lda, a);
    p.b = matrix_of(B, ldb, b);
    if ((a != GGML_TYPE_F32 && !p.a.expand) || (b != GGML_TYPE_F32 && !p.b.expand)) {
        return false;
    }
    if (!is_readable_in_place(&p.a, p.k) || !is_readable_in_place(&p.b, p.k) || ldc < m) {
        return false;
    }
    return run(params, &p, min_cols_of(a_type, false, params->nth));
}

bool pw_blas_multiply_strips(const struct ggml_compute_params * params, const struct strip_format * format, int64_t m, int64_t n,
                             int64_t k, const uint8_t * a, size_t a_stride, const uint8_t * b, float * c, int64_t ldc) {
    enum ggml_type type, y_type;
    pw_strip_types(format, &type, &y_type);
    blas_product p = {.m = m, .n = n, .k = k, .b = matrix_of(b, k / ggml_blck_size(y_type), y_type), .c = c, .ldc = ldc};
    p.a = (matrix) {a, a_stride, STRIP_ROWS * a_stride / (size_t) (k / ggml_blck_size(type)), ggml_blck_size(type),
                    pw_expand_function(type), format};
    return run(params, &p, min_cols_of(type, true, params->nth));
}
