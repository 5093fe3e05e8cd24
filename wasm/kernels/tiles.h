// Matrix products with several columns of activations: weights are unpacked once for all of them.
//
// A panel holds 32 weights of eight rows, two groups of four, in the order the products want them: lane r is row r of the
// group, and every 32 bits of it are four codes of 8 bits, or two of 16, that follow each other in the row. Products with 32
// bits of a column, which are repeated in all lanes, then add up without any sum across lanes.
#pragma once

#include "rows.h"

#include "ggml-cpu-impl.h"

#define N_COLS 4
#define N_GROUPS 2
#define PANEL_ROWS (N_GROUPS * N_ROWS)
#define PANEL_WEIGHTS 32

typedef struct {
    v128_t scale[N_GROUPS], min[N_GROUPS];  // f32 of each row; weight = scale * code + min
    v128_t codes[16][N_GROUPS];             // 8 of bytes or 16 of 16 bits
} weight_panel;

// In its place: one of the eight panels of a block of 256 whose scales stay integers (tiles_256.c), so that the block is scaled
// once. Factors are 16 bits, two for each row.
typedef struct {
    v128_t factors[N_GROUPS];            // the scale twice; or those of both groups of 16, whose codes are mixed
    v128_t mins[N_GROUPS];               // in every other panel the mins of this and the next
    v128_t codes[8][N_GROUPS];           // bytes
    v128_t d[N_GROUPS], dmin[N_GROUPS];  // f32, of the block: in its first panel
    v128_t unused[6][N_GROUPS];
} weight_panel_256;

// 32 activations of four columns: 8 of codes for weights that are bytes, 16 for those of 16 bits. All is repeated in all lanes.
typedef struct {
    v128_t scale[N_COLS];
    v128_t sum[N_COLS];  // as the format's tile wants it: 16-bit lanes to add to the products, or f32 to multiply min with
    v128_t codes[][N_COLS];
} activation_panel;

// What they hold for weight_panel_256.
typedef enum {
    PANELS,         // for weight_panel: as above
    PANELS_MINS,    // of blocks with mins: scale is the block's, sum in every other panel 16-bit sums of this and the next
    PANELS_BIASES,  // of blocks without, whose groups of 16 are mixed: 16-bit lanes to add to the products are in scale for the
                    // first four steps, in sum for the last, and the block's scale is behind the codes
} activation_kind;

// Codes of two groups of 16 weights: every 32 bits have two of the one and two of the other.
ALWAYS_INLINE void mix_groups(v128_t a, v128_t b, v128_t out[2]) {
    out[0] = wasm_i16x8_shuffle(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    out[1] = wasm_i16x8_shuffle(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// Unpack n blocks of each of eight rows, moving x on: one panel for blocks of 32 weights, eight for those of 256.
typedef void (*pack_function)(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels);

// Weights that are read soon, of which every panel fetches so many bytes: at the pace of the products, so that the processor's
// own prefetching takes it up and the memory works meanwhile.
typedef struct {
    const uint8_t * at;
    const uint8_t * end;  // where they end, or null: there are none
    size_t          n_bytes;
} read_ahead;

// acc[c] += what n panels give for column c and eight rows. The activations' panels follow each other without a gap.
typedef void (*tile_function)(int64_t n, const weight_panel * w, const activation_panel * y, v128_t acc[][N_GROUPS], read_ahead * ahead);

// Tiles with one, two and four columns.
typedef struct {
    tile_function   one, two, four;
    bool            has_words;  // codes are of 16 bits
    activation_kind activations;
} tile_set;

typedef struct {
    pack_function    pack;
    const tile_set * tiles;
    int              bias;       // codes are that much too large
    bool             is_strips;  // weights are repacked (strips.h): `pack` takes one pointer, to a strip
} tile_format;

extern const tile_set pw_tiles_nibbles;       // codes up to 31 with a bias, less which they are -16 to 15
extern const tile_set pw_tiles_nibbles_min;   // codes up to 15 with mins
extern const tile_set pw_tiles_bytes_min;     // codes up to 31 with mins
extern const tile_set pw_tiles_words;         // signed, 16 bits
extern const tile_set pw_tiles_q4_K, pw_tiles_q5_K, pw_tiles_q6_K;  // weight_panel_256

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

// The shares of a product's rows that one thread multiplies.
typedef struct {
    struct ggml_threadpool * pool;  // its counter tells the next share that nobody has, or null: each thread has one share
    int64_t                  n_groups, n_shares, next;
    int64_t                  n_turns, turn;  // how often all rows come, one with an n_turns of 1; and the last share's turn
} row_shares;

row_shares pw_row_shares(const struct ggml_compute_params * params, const product * p, bool is_dynamic);

// The next share: rows 4 * first up to 4 * last. False when none is left.
bool pw_next_share(row_shares * shares, int64_t * first, int64_t * last);

bool pw_multiply(const struct ggml_compute_params * params, const product * p);
void pw_multiply_tiles(const tile_format * format, const struct ggml_compute_params * params, const product * p);

// The same for f16, bf16 and f32. False, which every thread answers alike: not such weights, or rows too long for it.
bool pw_multiply_float_tiles(const struct ggml_compute_params * params, const product * p);
