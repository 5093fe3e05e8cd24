// Matrix products with quantized weights, by ggml's own hook (GGML_USE_LLAMAFILE): four rows of weights at a time, so that
// activations are read once for four, and sums of four rows are scaled together. Up to three columns of activations go through
// the rows kernels (rows.h), which read weights as they lie; more go through tiles (tiles.h), which unpack weights once for
// all of them. ggml calls it from every thread.
#include "blas.h"
#include "ggml-cpu-impl.h"
#include "ggml.h"
#include "llamafile/sgemm.h"
#include "tiles.h"

#define MIN_TILE_COLS 4
#define MIN_FLOAT_TILE_COLS 3

typedef struct {
    int                 weights, activations;
    rows_kernel         rows;
    const tile_format * tiles;  // or null: the rows kernel for any number of columns
} entry;

static const entry KERNELS[] = {
    {GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, pw_rows_q4_0, &pw_tile_q4_0},
    {GGML_TYPE_Q4_1, GGML_TYPE_Q8_1, pw_rows_q4_1, &pw_tile_q4_1},
    {GGML_TYPE_Q5_0, GGML_TYPE_Q8_0, pw_rows_q5_0, &pw_tile_q5_0},
    {GGML_TYPE_Q5_1, GGML_TYPE_Q8_1, pw_rows_q5_1, &pw_tile_q5_1},
    {GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, pw_rows_q8_0, &pw_tile_q8_0},
    {GGML_TYPE_IQ4_NL, GGML_TYPE_Q8_0, pw_rows_iq4_nl, &pw_tile_iq4_nl},
    {GGML_TYPE_Q4_K, GGML_TYPE_Q8_K, pw_rows_q4_K, &pw_tile_q4_K},
    {GGML_TYPE_Q5_K, GGML_TYPE_Q8_K, pw_rows_q5_K, &pw_tile_q5_K},
    {GGML_TYPE_Q6_K, GGML_TYPE_Q8_K, pw_rows_q6_K, &pw_tile_q6_K},
    {GGML_TYPE_Q2_K, GGML_TYPE_Q8_K, pw_rows_q2_K, NULL},
    {GGML_TYPE_Q3_K, GGML_TYPE_Q8_K, pw_rows_q3_K, &pw_tile_q3_K},
    {GGML_TYPE_TQ2_0, GGML_TYPE_Q8_K, pw_rows_tq2_0, NULL},
    {GGML_TYPE_IQ4_XS, GGML_TYPE_Q8_K, pw_rows_iq4_xs, &pw_tile_iq4_xs},
    {GGML_TYPE_MXFP4, GGML_TYPE_Q8_0, pw_rows_mxfp4, &pw_tile_mxfp4},
    {GGML_TYPE_F16, GGML_TYPE_F16, pw_rows_f16, NULL},
    {GGML_TYPE_BF16, GGML_TYPE_BF16, pw_rows_bf16, NULL},
    {GGML_TYPE_F32, GGML_TYPE_F32, pw_rows_f32, NULL},
};

static const entry * find_entry(int weights, int activations) {
    for (size_t i = 0; i < sizeof(KERNELS) / sizeof(KERNELS[0]); i++) {
        if (KERNELS[i].weights == weights && KERNELS[i].activations == activations) {
            return &KERNELS[i];
        }
    }
    return NULL;
}

// Each of the kernel's four rows out of a quarter of its own, so that every quarter is read from its beginning to its end: four
// long streams are what the processor's prefetching follows, four that take turns at short pieces it loses at every piece.
static void multiply_rows(rows_kernel kernel, const product * p, int64_t first_group, int64_t last_group) {
    const int64_t n_groups = last_group - first_group;
    for (int64_t group = 0; group < n_groups; group++) {
        int64_t         rows[N_ROWS];
        const uint8_t * x[N_ROWS];
        for (int r = 0; r < N_ROWS; r++) {
            rows[r] = N_ROWS * first_group + r * n_groups + group;
            x[r]    = p->a + (size_t) (rows[r] < p->m ? rows[r] : p->m - 1) * p->a_stride;
        }
        for (int64_t j = 0; j < p->n; j++) {
            float out[N_ROWS];
            kernel(p->k, x, p->b + (size_t) j * p->b_stride, out);
            for (int r = 0; r < N_ROWS && rows[r] < p->m; r++) {
                p->c[j * p->ldc + rows[r]] = out[r];
            }
        }
    }
}

// Where ggml has just quantized the activations it has also set a counter to the number of threads. Several shares for each
// thread then, given out as they are asked for: threads do not run equally fast, and a product ends with the slowest. Of the
// products of one operation only the first has the counter to itself.
#define SHARES_PER_THREAD 4
#define MIN_SHARE 8  // groups of rows

row_shares pw_row_shares(const struct ggml_compute_params * params, const product * p, bool is_dynamic) {
    row_shares shares = {.n_groups = (p->m + N_ROWS - 1) / N_ROWS, .n_shares = params->nth, .next = params->ith, .n_turns = 1};
    if (is_dynamic && params->nth > 1 && p->b == params->wdata && shares.n_groups > MIN_SHARE * params->nth) {
        const int64_t most = SHARES_PER_THREAD * params->nth, largest = shares.n_groups / MIN_SHARE;
        shares.pool     = params->threadpool;
        shares.n_shares = most < largest ? most : largest;
    }
    return shares;
}

bool pw_next_share(row_shares * shares, int64_t * first, int64_t * last) {
    if (shares->next >= shares->n_shares * shares->n_turns) {
        return false;
    }
    const int64_t n_pairs = (shares->n_groups + 1) / 2;  // tiles take two groups at once
    const int64_t i       = shares->next % shares->n_shares;
    shares->turn = shares->next / shares->n_shares;
    *first = 2 * (n_pairs * i / shares->n_shares);
    *last  = 2 * (n_pairs * (i + 1) / shares->n_shares);
    if (*last > shares->n_groups) {
        *last = shares->n_groups;
    }
    shares->next = shares->pool ? ggml_threadpool_chunk_add(shares->pool, 1) : shares->next + shares->n_shares;
    return true;
}

// The product by our own kernels.
bool pw_multiply(const struct ggml_compute_params * params, const product * p) {
    const entry * found = find_entry(p->a_type, p->b_type);
    if (!found) {
        return false;
    }
    if (found->tiles && p->n >= MIN_TILE_COLS) {
        pw_multiply_tiles(found->tiles, params, p);
        return true;
    }
    if (p->n >= MIN_FLOAT_TILE_COLS && pw_multiply_float_tiles(params, p)) {
        return true;
    }
    row_shares shares = pw_row_shares(params, p, true);
    int64_t    first, last;
    while (pw_next_share(&shares, &first, &last)) {
        multiply_rows(found->rows, p, first, last);
    }
    return true;
}

// C[j * ldc + i] = row i of A times row j of B; rows have k blocks and lie lda and ldb blocks apart. False: not ours, which
// every thread must answer alike.
bool llamafile_sgemm(const struct ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * A, int64_t lda,
                     const void * B, int64_t ldb, void * C, int64_t ldc, int a_type, int b_type, int c_type) {
    if (pw_blas_multiply(params, m, n, k, A, lda, B, ldb, C, ldc, a_type, b_type, c_type)) {
        return true;
    }
    const product p = {
        .m = m, .n = n, .k = k, .a = A, .b = B, .c = C, .ldc = ldc,
        .a_stride = (size_t) lda * ggml_type_size((enum ggml_type) a_type),
        .b_stride = (size_t) ldb * ggml_type_size((enum ggml_type) b_type),
        .a_type = (enum ggml_type) a_type, .b_type = (enum ggml_type) b_type,
    };
    return c_type == GGML_TYPE_F32 && pw_multiply(params, &p);
}
