// Products of f16, bf16 and f32 weights with several columns of activations.
//
// Activations are converted once for all rows and lie in groups of columns. A step is sixteen bytes of a row, which are one or
// two vectors of four values (floats.h):
//
//   activations, a group of n columns    [step][vector of the step][column][4 values]
//
// Weights are converted as they are multiplied, two rows at a time, which takes two instructions for all columns of a group.
// Some dozen steps of four rows are multiplied with all columns before the next ones, so that they come from the first-level
// cache but for the first group. Lanes are values of one row in both: nothing is repeated, and four sums are added to one at the
// very end. Each result is summed in the same order whatever is multiplied beside it.
#include "floats.h"
#include "tiles.h"

#define PAIR 2                 // rows multiplied together
#define GROUP 4                // columns multiplied together, at most
#define BATCH 2                // columns loaded at a time
#define TURN 4                 // vectors of a row that a turn of the loop takes: with two, a sum of f32 would lie in memory
#define CHUNK 64               // steps of four rows that are multiplied with all columns at a time, at most
#define MAX_COLS 64            // of activations, converted together
#define MAX_ACTIVATIONS 23040  // vectors of them, on the stack

ALWAYS_INLINE int vectors_of(float_kind kind) {
    return kind == F32 ? 1 : 2;
}

// Vector i of the step at x. For the second one, which is the lower halves, the load begins two bytes before: they are the upper
// ones then, and one constant less takes up a register.
ALWAYS_INLINE v128_t load_vector(const uint8_t * x, int i, float_kind kind) {
    return read_floats(wasm_v128_load(x - 2 * i), kind).upper;
}

ALWAYS_INLINE v128_t vector_of(v128_t bytes, int i, float_kind kind) {
    const floats read = read_floats(bytes, kind);
    return i == 0 ? read.upper : read.lower;
}

// acc[c][r] += n_steps steps, whole turns, of two rows times n_cols columns. The runtime's compiler has only the fused operation
// that overwrites a factor: that is a column, which the second row is the last to want.
ALWAYS_INLINE void tile(const uint8_t * const rows[PAIR], int64_t n_steps, const v128_t * y, v128_t acc[][N_ROWS], int n_cols,
                        float_kind kind) {
    const int       n_vectors = vectors_of(kind);
    const uint8_t * x[PAIR] = {rows[0], rows[1]}, * end = rows[0] + 16 * n_steps;
    v128_t          sums[GROUP][PAIR];
    for (int i = 0; i < n_cols * PAIR; i++) {
        sums[i / PAIR][i % PAIR] = acc[i / PAIR][i % PAIR];
    }
#pragma clang loop unroll(disable)
    while (x[0] != end) {
#pragma clang loop unroll(full)
        for (int i = 0; i < TURN; i++) {
            v128_t w[PAIR];
#pragma clang loop unroll(full)
            for (int first = 0; first < n_cols; first += BATCH) {
                do {
                    for (int r = 0; r < PAIR && first == 0; r++) {
                        OPAQUE(x[r]);
                        w[r] = load_vector(x[r] + 16 * (i / n_vectors), i % n_vectors, kind);
                    }
                    OPAQUE(y);
                    for (int c = first; c < n_cols && c < first + BATCH; c++) {
                        const v128_t column = y[n_cols * i + c];
                        for (int r = 0; r < PAIR; r++) {
                            sums[c][r] = wasm_f32x4_relaxed_madd(column, w[r], sums[c][r]);
                        }
                    }
                } while ((i < TURN - 1 || first + BATCH < n_cols) && is_repeated(y));
            }
        }
        for (int r = 0; r < PAIR; r++) {
            x[r] += 16 * TURN / n_vectors;
            OPAQUE(x[r]);
        }
        y += n_cols * TURN;
        OPAQUE(y);
    }
    for (int i = 0; i < n_cols * PAIR; i++) {
        acc[i / PAIR][i % PAIR] = sums[i / PAIR][i % PAIR];
    }
}

// The last n_bytes of a row, less than a turn.
ALWAYS_INLINE void rest(const uint8_t * x, size_t n_bytes, const v128_t * y, v128_t acc[][N_ROWS], int n_cols, float_kind kind) {
    for (size_t at = 0; at < n_bytes; at += 16) {
        const v128_t bytes = load_up_to(x + at, n_bytes - at);
        for (int i = 0; i < vectors_of(kind); i++, y += n_cols) {
            for (int c = 0; c < n_cols; c++) {
                acc[c][0] = wasm_f32x4_add(acc[c][0], wasm_f32x4_mul(vector_of(bytes, i, kind), y[c]));
            }
        }
    }
}

// Halves of activations are mended so that infinities and NaN, which f16.h reads as 65536 and more, become infinities by
// overflow, as 65504 does not. Weights, which are not mended, are 2^-112 times their value, activations 2^100 times, and no
// product is subnormal.
#define F16_UNIT 0x1p12f

ALWAYS_INLINE v128_t mended(v128_t placed, float_kind kind) {
    const v128_t most = wasm_f32x4_splat(0x1p112f);
    return kind != F16 ? placed : wasm_f32x4_mul(wasm_f32x4_mul(wasm_f32x4_mul(placed, most), most), wasm_f32x4_splat(1 / F16_UNIT));
}

// n_bytes of a row of activations as n_steps steps of one of n_cols columns, the last ones zeros.
ALWAYS_INLINE void convert(const uint8_t * x, size_t n_bytes, int64_t n_steps, v128_t * out, int n_cols, float_kind kind) {
    for (int64_t step = 0; step < n_steps; step++, x += 16) {
        const size_t at    = (size_t) step * 16;
        const v128_t bytes = at < n_bytes ? load_up_to(x, n_bytes - at) : wasm_i32x4_splat(0);
        for (int i = 0; i < vectors_of(kind); i++, out += n_cols) {
            *out = mended(vector_of(bytes, i, kind), kind);
        }
    }
}

typedef void (*pair_function)(const uint8_t * const x[PAIR], int64_t n_steps, const v128_t * y, v128_t acc[][N_ROWS]);
typedef void (*rest_function)(const uint8_t * x, size_t n_bytes, const v128_t * y, v128_t acc[][N_ROWS], int n_cols);
typedef void (*convert_function)(const uint8_t * x, size_t n_bytes, int64_t n_steps, v128_t * out, int n_cols);

// Functions, not inlined: their entries are safepoints.
#define TILE(name, kind, n_cols)                                                                                           \
    __attribute__((noinline)) static void tile_##name##_##n_cols(const uint8_t * const x[PAIR], int64_t n_steps,           \
                                                                 const v128_t * y, v128_t acc[][N_ROWS]) {                 \
        tile(x, n_steps, y, acc, n_cols, kind);                                                                            \
    }
#define KERNELS(name, kind)                                                                                                \
    TILE(name, kind, 1)                                                                                                    \
    TILE(name, kind, 2)                                                                                                    \
    TILE(name, kind, 3)                                                                                                    \
    TILE(name, kind, 4)                                                                                                    \
    __attribute__((noinline)) static void rest_##name(const uint8_t * x, size_t n_bytes, const v128_t * y,                 \
                                                      v128_t acc[][N_ROWS], int n_cols) {                                  \
        rest(x, n_bytes, y, acc, n_cols, kind);                                                                            \
    }                                                                                                                      \
    static void convert_##name(const uint8_t * x, size_t n_bytes, int64_t n_steps, v128_t * out, int n_cols) {             \
        convert(x, n_bytes, n_steps, out, n_cols, kind);                                                                   \
    }
KERNELS(f16, F16)
KERNELS(bf16, BF16)
KERNELS(f32, F32)

typedef struct {
    enum ggml_type   type;
    float_kind       kind;
    float            unit;   // of the sums of products
    pair_function    tiles[GROUP];  // by columns, from one on
    rest_function    rest;
    convert_function activations;
} float_format;

#define FORMAT(type, kind, unit, name) \
    {type, kind, unit, {tile_##name##_1, tile_##name##_2, tile_##name##_3, tile_##name##_4}, rest_##name, convert_##name}
static const float_format FORMATS[] = {
    FORMAT(GGML_TYPE_F16, F16, F16_UNIT, f16),
    FORMAT(GGML_TYPE_BF16, BF16, 1.0f, bf16),
    FORMAT(GGML_TYPE_F32, F32, 1.0f, f32),
};

// Columns of a product, with their activations converted.
typedef struct {
    const product *      p;
    const float_format * format;
    int64_t              col, n_cols, n_steps;  // n_steps of a row, the last one may be filled up
    size_t               row_bytes;
    const v128_t *       activations;
} part;

// How many columns the group has that begins with column j.
static int group_at(const part * s, int64_t j) {
    return s->n_cols - j < GROUP ? (int) (s->n_cols - j) : GROUP;
}

static int64_t vectors_of_column(const part * s) {
    return s->n_steps * vectors_of(s->format->kind);
}

static void convert_activations(const part * s, v128_t * out) {
    for (int64_t first = 0; first < s->n_cols; first += group_at(s, first)) {
        const int n = group_at(s, first);
        for (int j = 0; j < n; j++) {
            const uint8_t * y = s->p->b + (size_t) (s->col + first + j) * s->p->b_stride;
            s->format->activations(y, s->row_bytes, s->n_steps, out + first * vectors_of_column(s) + j, n);
        }
    }
}

// Steps `first` to `last` of the four rows, for all columns.
static void multiply_chunk(const part * s, const uint8_t * const rows[N_ROWS], int64_t first, int64_t last, v128_t acc[][N_ROWS]) {
    const size_t  at = 16 * (size_t) first, most = 16 * (size_t) last, n_bytes = (s->row_bytes < most ? s->row_bytes : most) - at;
    const int64_t turn    = TURN / vectors_of(s->format->kind), n_steps = (int64_t) (n_bytes / 16) / turn * turn;
    const size_t  n_whole = 16 * (size_t) n_steps;
    for (int64_t j = 0; j < s->n_cols; j += group_at(s, j)) {
        const int           n    = group_at(s, j);
        const pair_function tile = s->format->tiles[n - 1];
        const v128_t *      y    = s->activations + j * vectors_of_column(s) + first * vectors_of(s->format->kind) * n;
        for (int r = 0; r < N_ROWS; r += PAIR) {
            const uint8_t * x[PAIR] = {rows[r] + at, rows[r + 1] + at};
            v128_t (*sums)[N_ROWS]  = (v128_t (*)[N_ROWS]) &acc[j][r];
            tile(x, n_steps, y, sums);
            for (int i = 0; i < PAIR && n_bytes > n_whole; i++) {
                const v128_t * last = y + n_steps * vectors_of(s->format->kind) * n;
                s->format->rest(x[i] + n_whole, n_bytes - n_whole, last, (v128_t (*)[N_ROWS]) &sums[0][i], n);
            }
        }
    }
}

// The four rows that begin at x, results to rows[r] of each column where that is below the number of rows.
static void multiply_block(const part * s, const uint8_t * const x[N_ROWS], const int64_t rows[N_ROWS]) {
    v128_t acc[MAX_COLS][N_ROWS];
    memset(acc, 0, (size_t) s->n_cols * sizeof(acc[0]));
    for (int64_t first = 0; first < s->n_steps; first += CHUNK) {
        multiply_chunk(s, x, first, first + CHUNK < s->n_steps ? first + CHUNK : s->n_steps, acc);
    }
    const v128_t unit = wasm_f32x4_splat(s->format->unit);
    for (int64_t j = 0; j < s->n_cols; j++) {
        float results[N_ROWS], * c = s->p->c + (s->col + j) * s->p->ldc;
        wasm_v128_store(results, wasm_f32x4_mul(sum_of_each(acc[j]), unit));
        for (int r = 0; r < N_ROWS && rows[r] < s->p->m; r++) {
            c[rows[r]] = results[r];
        }
    }
}

// As in matmul.c each of the four rows comes out of a quarter of its own of the share: four long streams.
static void multiply_part(const struct ggml_compute_params * params, const part * s, bool is_whole) {
    const product * p      = s->p;
    row_shares      shares = pw_row_shares(params, p, is_whole);
    int64_t         first, last;
    while (pw_next_share(&shares, &first, &last)) {
        for (int64_t i = 0; i < last - first; i++) {
            int64_t         rows[N_ROWS];
            const uint8_t * x[N_ROWS];
            for (int r = 0; r < N_ROWS; r++) {
                rows[r] = N_ROWS * first + r * (last - first) + i;
                x[r]    = p->a + (size_t) (rows[r] < p->m ? rows[r] : p->m - 1) * p->a_stride;
            }
            multiply_block(s, x, rows);
        }
    }
}

static const float_format * format_of(const product * p) {
    for (size_t i = 0; i < sizeof(FORMATS) / sizeof(FORMATS[0]); i++) {
        if (FORMATS[i].type == p->a_type && p->b_type == p->a_type) {
            return &FORMATS[i];
        }
    }
    return NULL;
}

bool pw_multiply_float_tiles(const struct ggml_compute_params * params, const product * p) {
    part s = {.p = p, .format = format_of(p)};
    if (!s.format || p->k < 1) {
        return false;
    }
    s.row_bytes = (size_t) p->k * ggml_type_size(p->a_type);
    s.n_steps   = (int64_t) ((s.row_bytes + 15) / 16);
    const int64_t n_fitting = MAX_ACTIVATIONS / vectors_of_column(&s) / GROUP * GROUP;
    if (n_fitting == 0) {
        return false;
    }
    v128_t        activations[MAX_ACTIVATIONS];
    const int64_t max_cols = n_fitting < MAX_COLS ? n_fitting : MAX_COLS, n_parts = (p->n + max_cols - 1) / max_cols;
    s.activations = activations;
    for (int64_t i = 0; i < n_parts; i++, s.col += s.n_cols) {
        s.n_cols = p->n * (i + 1) / n_parts - s.col;
        convert_activations(&s, activations);
        multiply_part(params, &s, n_parts == 1);
    }
    return true;
}
