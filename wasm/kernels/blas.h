// Matrix products by the host's BLAS (host.sgemm, numpy's): the sandbox expands weights and activations to f32, the host
// multiplies them.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// By the host, before any product.
void pw_set_blas(int is_on);

// llamafile_sgemm's product, if it is one for BLAS; false, which every thread answers alike, and nothing is done, if not.
bool pw_blas_multiply(const struct ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * A, int64_t lda,
                      const void * B, int64_t ldb, void * C, int64_t ldc, int a_type, int b_type, int c_type);

// n numbers, whole blocks, as f32: to the last bit what ggml's to_float gives.
typedef void (*expand_function)(const void * blocks, float * out, int64_t n);

// The fastest expansion of that type; ggml's own where there is none of ours, null where it has none either.
expand_function pw_expand_function(enum ggml_type type);

#ifdef __cplusplus
}
#endif
