// Matrix products with quantized weights, by ggml's own hook (GGML_USE_LLAMAFILE): four rows of weights at a time, so that
// activations are read once for four, and sums of four rows are scaled together. ggml calls it from every thread.
#include "ggml-cpu-impl.h"
#include "ggml.h"
#include "llamafile/sgemm.h"
#include "rows.h"

typedef struct {
    int         weights, activations;
    rows_kernel kernel;
} entry;

static const entry KERNELS[] = {
    {GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, pw_rows_q4_0},     {GGML_TYPE_Q4_1, GGML_TYPE_Q8_1, pw_rows_q4_1},
    {GGML_TYPE_Q5_0, GGML_TYPE_Q8_0, pw_rows_q5_0},     {GGML_TYPE_Q5_1, GGML_TYPE_Q8_1, pw_rows_q5_1},
    {GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, pw_rows_q8_0},     {GGML_TYPE_IQ4_NL, GGML_TYPE_Q8_0, pw_rows_iq4_nl},
    {GGML_TYPE_Q4_K, GGML_TYPE_Q8_K, pw_rows_q4_K},     {GGML_TYPE_Q5_K, GGML_TYPE_Q8_K, pw_rows_q5_K},
    {GGML_TYPE_Q6_K, GGML_TYPE_Q8_K, pw_rows_q6_K},
};

static rows_kernel find_kernel(int weights, int activations) {
    for (size_t i = 0; i < sizeof(KERNELS) / sizeof(KERNELS[0]); i++) {
        if (KERNELS[i].weights == weights && KERNELS[i].activations == activations) {
            return KERNELS[i].kernel;
        }
    }
    return NULL;
}

// C[j * ldc + i] = row i of A times row j of B; rows have k blocks and lie lda and ldb blocks apart. False: not ours, which
// every thread must answer alike.
bool llamafile_sgemm(const struct ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * A, int64_t lda,
                     const void * B, int64_t ldb, void * C, int64_t ldc, int a_type, int b_type, int c_type) {
    const rows_kernel kernel = find_kernel(a_type, b_type);
    if (!kernel || c_type != GGML_TYPE_F32) {
        return false;
    }
    const size_t  a_stride = (size_t) lda * ggml_type_size((enum ggml_type) a_type);
    const size_t  b_stride = (size_t) ldb * ggml_type_size((enum ggml_type) b_type);
    const int64_t n_groups = (m + N_ROWS - 1) / N_ROWS;
    const int64_t first = n_groups * params->ith / params->nth, last = n_groups * (params->ith + 1) / params->nth;
    for (int64_t group = first; group < last; group++) {
        const int64_t   row    = N_ROWS * group;
        const int64_t   n_rows = m - row < N_ROWS ? m - row : N_ROWS;
        const uint8_t * x[N_ROWS + 1];
        for (int r = 0; r < N_ROWS; r++) {
            x[r] = (const uint8_t *) A + (size_t) (row + (r < n_rows ? r : n_rows - 1)) * a_stride;
        }
        for (int64_t j = 0; j < n; j++) {
            // only where a whole group follows: beyond the last row may be the end of the memory
            x[N_ROWS] = j == 0 && row + 2 * N_ROWS <= m ? x[0] + N_ROWS * a_stride : NULL;
            float out[N_ROWS];
            kernel(k, x, (const uint8_t *) B + (size_t) j * b_stride, out);
            for (int r = 0; r < n_rows; r++) {
                ((float *) C)[j * ldc + row + r] = out[r];
            }
        }
    }
    return true;
}
