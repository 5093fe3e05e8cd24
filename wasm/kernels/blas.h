// Matrix products by the host's BLAS (host.sgemm, numpy's): the sandbox expands weights and activations to f32, the host
// multiplies them.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml.h"
#include "../sysroot/pw.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// What the host has: no BLAS, one that is fast on many columns, or one that also is on few, since it reads small factors where
// they lie (pyllama_wasm/host/blas.py).
enum { BLAS_OFF, BLAS_WHOLE, BLAS_SLICES };

// By the host, before any product.
void pw_set_blas(int kind);

// llamafile_sgemm's product, if it is one for BLAS; false, which every thread answers alike, and nothing is done, if not.
bool pw_blas_multiply(const struct ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * A, int64_t lda,
                      const void * B, int64_t ldb, void * C, int64_t ldc, int a_type, int b_type, int c_type);

// The same for repacked weights (strips.h): k numbers in a row, activations as the format wants them, one column behind another.
struct strip_format;
bool pw_blas_multiply_strips(const struct ggml_compute_params * params, const struct strip_format * format, int64_t m, int64_t n,
                             int64_t k, const uint8_t * a, size_t a_stride, const uint8_t * b, float * c, int64_t ldc);

// Eight rows of n of a strip's records as f32, the rows `stride` numbers apart.
void pw_expand_strip(const struct strip_format * format, const uint8_t * x, int64_t n, float * out, int64_t stride);

// What a format's weights are, and its activations.
void pw_strip_types(const struct strip_format * format, enum ggml_type * weights, enum ggml_type * activations);

// Whether products may go to the host.
bool pw_blas_is_on(void);

// C[j * ldc + i] = sum over l < k of A[i * lda + l] * B[j * ldb + l], all in f32, for i < m and j < n. The host refuses, by a
// trap, what is out of bounds, more than PW_MAX_PRODUCTS multiplications and a matrix of more than PW_MAX_ELEMENTS.
PW_IMPORT(sgemm) void pw_host_sgemm(uint32_t m, uint32_t n, uint32_t k, const float * a, uint32_t lda, const float * b, uint32_t ldb,
                                    float * c, uint32_t ldc);
#define PW_MAX_PRODUCTS (1 << 29)  // the host's limit, so that a call takes some ten milliseconds
#define PW_MAX_ELEMENTS (1 << 25)  // the host's too

// Room for n numbers, at most PW_MAX_BUFFER, this thread's until its next product or attention; null where there is none.
float * pw_blas_buffer(int64_t n);
#define PW_MAX_BUFFER ((int64_t) (4 << 20) / (int64_t) sizeof(float))

// n numbers, whole blocks, as f32: to the last bit what ggml's to_float gives.
typedef void (*expand_function)(const void * blocks, float * out, int64_t n);

// The fastest expansion of that type; ggml's own where there is none of ours, null where it has none either.
expand_function pw_expand_function(enum ggml_type type);

#ifdef __cplusplus
}
#endif
