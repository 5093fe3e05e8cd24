// Matrix products with several columns of activations: weights are unpacked once for all of them.
//
// A panel holds 32 weights of four rows in the order the products want them: lane r is row r, and every 32 bits of it are
// four codes of 8 bits, or two of 16, that follow each other in the row. Products with 32 bits of a column, repeated in all
// lanes, then add up without any sum across lanes.
#pragma once

#include "rows.h"

#include "ggml-cpu-impl.h"

#define N_COLS 4
#define PANEL_WEIGHTS 32

typedef struct {
    v128_t scale, min;  // f32 of each row; weight = scale * code + min
    v128_t codes[16];   // 8 of bytes or 16 of 16 bits
} weight_panel;

typedef struct {
    float  scale[N_COLS];
    v128_t sum;  // of each column, as the format's tile wants it: int32 to add to the products, or f32 to multiply min with
    int8_t codes[N_COLS][PANEL_WEIGHTS];
} activation_panel;

// Unpack n blocks of each of four rows, moving x on: one panel for blocks of 32 weights, eight for those of 256. Returns what
// follows the bytes at `next`, which as many will be read from soon, or null.
typedef const uint8_t * (*pack_function)(int64_t n, const uint8_t * x[N_ROWS], const uint8_t * next, weight_panel * panels);

// acc[c] += what n panels give for column c and four rows.
typedef void (*tile_function)(int64_t n, const weight_panel * w, const activation_panel * y, v128_t * acc);

// Tiles with one, two and four columns.
typedef struct {
    tile_function one, two, four;
} tile_set;

typedef struct {
    pack_function    pack;
    const tile_set * tiles;
    int              bias;  // codes are that much too large
} tile_format;

extern const tile_set pw_tiles_nibbles;       // codes up to 15
extern const tile_set pw_tiles_nibbles_min;   //  ... with mins
extern const tile_set pw_tiles_bytes;         // codes up to 31
extern const tile_set pw_tiles_bytes_min;     //  ... with mins
extern const tile_set pw_tiles_words;         // signed, 16 bits

extern const tile_format pw_tile_q4_0, pw_tile_q4_1, pw_tile_q5_0, pw_tile_q5_1, pw_tile_q8_0, pw_tile_iq4_nl;
extern const tile_format pw_tile_q4_K, pw_tile_q5_K, pw_tile_q6_K;
extern const tile_format pw_tile_q3_K, pw_tile_iq4_xs, pw_tile_mxfp4;

// The operands of one product, in blocks of the weights' type; see llamafile_sgemm.
typedef struct {
    int64_t         m, n, k;
    const uint8_t * a;
    const uint8_t * b;
    float *         c;
    size_t          a_stride, b_stride;  // bytes
    int64_t         ldc;                 // floats
    enum ggml_type  a_type, b_type;
} product;

const uint8_t * pw_next_rows(const product * p, int64_t row);

bool pw_multiply(const struct ggml_compute_params * params, const product * p);
void pw_multiply_tiles(const tile_format * format, const product * p, int64_t first_group, int64_t last_group);
