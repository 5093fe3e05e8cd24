// Products of f16, bf16 and f32 weights with several columns of activations.
//
// Four rows of weights are converted once for all columns, some hundred values of each at a time, and stay in the first-level
// cache while they are multiplied; activations are converted once for all rows. A step is four values of a row:
//
//   weights, four rows        [step][row][4 values]     activations, n columns    [step][column][4 values]
//
// Lanes are values that follow each other in both, so nothing is repeated, and four sums are added to one at the very end. Each
// result is summed in the same order whatever is multiplied beside it.
#include "floats.h"
#include "tiles.h"

#define GROUP 2                // columns multiplied together
#define TURN 4                 // steps that a turn of the loop takes; rows are filled up with zeros to whole turns
#define DEPTH 1280             // steps of the rows that are converted at a time, at most
#define MAX_COLS 64            // of activations, converted together
#define MAX_ACTIVATIONS 23040  // steps of them, on the stack

// acc += four rows times n_cols columns, up to the step at `end`. A product and a sum, not one fused operation: the runtime's
// compiler has only that which overwrites a factor, and the sum then takes one or two moves to come back to its register.
ALWAYS_INLINE void tile(const v128_t * w, const v128_t * end, const v128_t * y, v128_t acc[][N_ROWS], int n_cols) {
    v128_t sums[GROUP][N_ROWS];
    for (int i = 0; i < n_cols * N_ROWS; i++) {
        sums[i / N_ROWS][i % N_ROWS] = acc[i / N_ROWS][i % N_ROWS];
    }
#pragma clang loop unroll(disable)
    do {
#pragma clang loop unroll(full)
        for (int i = 0; i < TURN; i++) {
            do {
                OPAQUE(w);
                OPAQUE(y);
                v128_t rows[N_ROWS], columns[GROUP];
                for (int r = 0; r < N_ROWS; r++) {
                    rows[r] = w[N_ROWS * i + r];
                }
                for (int c = 0; c < n_cols; c++) {
                    columns[c] = y[n_cols * i + c];
                }
                for (int j = 0; j < n_cols * N_ROWS; j++) {
                    v128_t * sum = &sums[j / N_ROWS][j % N_ROWS];
                    *sum         = wasm_f32x4_add(*sum, wasm_f32x4_mul(rows[j % N_ROWS], columns[j / N_ROWS]));
                }
            } while (i < TURN - 1 && is_repeated(y));
        }
        w += N_ROWS * TURN;
        y += n_cols * TURN;
        OPAQUE(w);
        OPAQUE(y);
    } while (w != end);
    for (int i = 0; i < n_cols * N_ROWS; i++) {
        acc[i / N_ROWS][i % N_ROWS] = sums[i / N_ROWS][i % N_ROWS];
    }
}

// Functions, not inlined: their entries are safepoints.
__attribute__((noinline)) static void tile_1(const v128_t * w, const v128_t * end, const v128_t * y, v128_t acc[][N_ROWS]) {
    tile(w, end, y, acc, 1);
}

__attribute__((noinline)) static void tile_2(const v128_t * w, const v128_t * end, const v128_t * y, v128_t acc[][N_ROWS]) {
    tile(w, end, y, acc, 2);
}

ALWAYS_INLINE v128_t scaled(v128_t v, float first, float second) {
    return wasm_f32x4_mul(wasm_f32x4_mul(v, wasm_f32x4_splat(first)), wasm_f32x4_splat(second));
}

// Halves are mended so that infinities and NaN, which f16.h reads as 65536 and more, become infinities by overflow, as 65504 does
// not: weights are 2^112 times their value, activations 2^-100 times, and nothing is subnormal.
#define F16_UNIT 0x1p-12f

ALWAYS_INLINE v128_t mend(v128_t placed, bool is_activations) {
    const v128_t far = scaled(placed, 0x1p112f, 0x1p112f);
    return is_activations ? scaled(far, 0x1p-106f, 0x1p-106f) : far;
}

// Sixteen bytes of a row as steps: two of halves, one of f32.
ALWAYS_INLINE void put_steps(v128_t bytes, v128_t * out, int64_t stride, float_kind kind, bool is_activations) {
    const floats read = read_floats(bytes, kind);
    out[0] = kind == F16 ? mend(read.upper, is_activations) : read.upper;
    if (kind != F32) {
        out[stride] = kind == F16 ? mend(read.lower, is_activations) : read.lower;
    }
}

// n_bytes of each of n_rows rows, a constant, as n_steps steps, `stride` vectors apart, the last ones zeros.
ALWAYS_INLINE void convert(const uint8_t * const * rows, size_t n_bytes, int64_t n_steps, v128_t * out, int64_t stride, int n_rows,
                           float_kind kind, bool is_activations) {
    const int64_t   n_parts = kind == F32 ? 1 : 2;
    const v128_t *  end = out + n_steps * stride, * last = out + (int64_t) (n_bytes / 16) * n_parts * stride;
    const uint8_t * x[N_ROWS];
    for (int r = 0; r < n_rows; r++) {
        x[r] = rows[r];
    }
    for (; out != last; out += n_parts * stride) {
        for (int r = 0; r < n_rows; r++) {
            put_steps(wasm_v128_load(x[r]), out + r, stride, kind, is_activations);
            x[r] += 16;
            OPAQUE(x[r]);
        }
        OPAQUE(out);
    }
    if (n_bytes % 16) {
        for (int r = 0; r < n_rows; r++) {
            put_steps(load_up_to(x[r], n_bytes % 16), out + r, stride, kind, is_activations);
        }
        out += n_parts * stride;
    }
    for (; out != end; out += stride) {
        for (int r = 0; r < n_rows; r++) {
            out[r] = wasm_f32x4_splat(0.0f);
        }
    }
}

#define CONVERT(name, kind)                                                                                                \
    static void weights_##name(const uint8_t * const x[N_ROWS], size_t n_bytes, int64_t n_steps, v128_t * out) {           \
        convert(x, n_bytes, n_steps, out, N_ROWS, N_ROWS, kind, false);                                                    \
    }                                                                                                                      \
    static void activations_##name(const uint8_t * x, size_t n_bytes, int64_t n_steps, v128_t * out, int64_t stride) {     \
        convert(&x, n_bytes, n_steps, out, stride, 1, kind, true);                                                         \
    }
CONVERT(f16, F16)
CONVERT(bf16, BF16)
CONVERT(f32, F32)

typedef struct {
    enum ggml_type type;
    float          unit;        // of the sums of products
    int64_t        step_bytes;  // of a row
    void (*weights)(const uint8_t * const x[N_ROWS], size_t n_bytes, int64_t n_steps, v128_t * out);
    void (*activations)(const uint8_t * x, size_t n_bytes, int64_t n_steps, v128_t * out, int64_t stride);
} float_format;

static const float_format FORMATS[] = {
    {GGML_TYPE_F16, F16_UNIT, 8, weights_f16, activations_f16},
    {GGML_TYPE_BF16, 1.0f, 8, weights_bf16, activations_bf16},
    {GGML_TYPE_F32, 1.0f, 16, weights_f32, activations_f32},
};

// Columns of a product, with their activations converted.
typedef struct {
    const product *      p;
    const float_format * format;
    int64_t              col, n_cols, n_steps;  // n_steps of a row
    size_t               row_bytes;
    const v128_t *       activations;
} part;

static int64_t group_at(const part * s, int64_t j) {
    return s->n_cols - j < GROUP ? s->n_cols - j : GROUP;
}

static void convert_activations(const part * s, v128_t * out) {
    for (int64_t j = 0; j < s->n_cols; j++) {
        const int64_t   first = j / GROUP * GROUP;
        const uint8_t * y     = s->p->b + (size_t) (s->col + j) * s->p->b_stride;
        s->format->activations(y, s->row_bytes, s->n_steps, out + first * s->n_steps + j % GROUP, group_at(s, first));
    }
}

// Steps `first` to `last` of the four rows, for all columns.
static void multiply_chunk(const part * s, const uint8_t * const x[N_ROWS], int64_t first, int64_t last, v128_t acc[][N_ROWS]) {
    v128_t          panel[DEPTH * N_ROWS];
    const v128_t *  end  = panel + (last - first) * N_ROWS;
    const size_t    at   = (size_t) (first * s->format->step_bytes), most = (size_t) (last * s->format->step_bytes);
    const uint8_t * rows[N_ROWS];
    for (int r = 0; r < N_ROWS; r++) {
        rows[r] = x[r] + at;
    }
    s->format->weights(rows, (s->row_bytes < most ? s->row_bytes : most) - at, last - first, panel);
    for (int64_t j = 0; j < s->n_cols; j += GROUP) {
        const int64_t  n = group_at(s, j);
        const v128_t * y = s->activations + j * s->n_steps + first * n;
        (n == 1 ? tile_1 : tile_2)(panel, end, y, acc + j);
    }
}

// The four rows that begin at x, results to rows[r] of each column where that is below the number of rows.
static void multiply_block(const part * s, const uint8_t * const x[N_ROWS], const int64_t rows[N_ROWS]) {
    v128_t        acc[MAX_COLS][N_ROWS];
    const int64_t n_turns = s->n_steps / TURN, n_chunks = (s->n_steps + DEPTH - 1) / DEPTH;
    memset(acc, 0, (size_t) s->n_cols * sizeof(acc[0]));
    for (int64_t i = 0; i < n_chunks; i++) {
        multiply_chunk(s, x, n_turns * i / n_chunks * TURN, n_turns * (i + 1) / n_chunks * TURN, acc);
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
    s.n_steps   = ((p->k + 3) / 4 + TURN - 1) / TURN * TURN;
    const int64_t n_fitting = MAX_ACTIVATIONS / s.n_steps / GROUP * GROUP;
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
