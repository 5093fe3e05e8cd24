// Repacked weights: eight rows of a matrix woven into one strip, so that a vector holds four rows side by side, four codes of
// each, and sums of products need no sum across lanes. A copy of the weights in this layout (repack.cpp) is what one column
// of activations is multiplied with half as many instructions as with rows as they lie in the file.
#pragma once

#include "tiles.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define STRIP_ROWS PANEL_ROWS

// Between a block of each of eight rows and the strip's record of them; `is_weaving` says in which direction.
typedef void (*weave_function)(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving);

// Activations of one block as a kernel takes them. It repeats every 32 bits of codes in all lanes by itself: repeated here, they
// would push each other out of the first-level cache where rows are long, and weights then come from memory at half the rate.
typedef void (*column_function)(const uint8_t * y, v128_t * column);

// acc += n records times a column.
typedef void (*strip_kernel)(int64_t n, const uint8_t * x, const v128_t * column, v128_t acc[N_GROUPS]);

typedef struct strip_format {
    enum ggml_type      type, activations;
    size_t              record_bytes;
    size_t              column_vectors;  // of a block's activations
    weave_function      weave;
    column_function     set_column;
    strip_kernel        multiply;
    const tile_format * tiles;   // more than a few columns
    const tile_format * panels;  // the expansion to f32 (blas_expand.c)
} strip_format;

extern const strip_format pw_strip_q4_0, pw_strip_q4_1, pw_strip_q5_0, pw_strip_q5_1, pw_strip_q4_K, pw_strip_q5_K, pw_strip_q6_K;

// How weights of that type and size are repacked, or null: they stay as they are.
const strip_format * pw_strip_format(const struct ggml_tensor * weights);

// The bytes of a whole tensor.
size_t pw_strip_bytes(const strip_format * format, const struct ggml_tensor * weights);

// From rows as they lie in a file to strips, and back.
void pw_weave(const strip_format * format, const struct ggml_tensor * weights, uint8_t * strips, uint8_t * rows, bool is_weaving);

// MUL_MAT with repacked weights: its room in the work buffer, and the product, to be called by every thread.
size_t pw_strip_work_bytes(const struct ggml_tensor * dst);
void   pw_multiply_strips(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
