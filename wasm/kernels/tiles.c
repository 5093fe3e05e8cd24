// The tiles (see tiles.h), the activations' panels, and the loops around both.
//
// Activations of up to 64 columns are brought into panels that stay in the second-level cache, then four rows of weights at a
// time are unpacked into a few kilobytes and multiplied with all of these columns.
#include "tiles.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#define MAX_COLS 64    // together in panels
#define N_PANELS 512   // of activations, 80 KB on the stack
#define CHUNK 16       // panels of weights unpacked at a time

#define SPLAT32(v, i) wasm_i32x4_shuffle(v, v, i, i, i, i)

typedef enum { NIBBLES, BYTES, WORDS } code_kind;

// The products of four times four bytes, or two 16-bit codes, of each row with those of each column.
#define STEP(s)                                                                                                            \
    do {                                                                                                                   \
        const v128_t codes = w->codes[4 * part + (s)];                                                                     \
        for (int c = 0; c < n_cols; c++) {                                                                                 \
            const v128_t column = SPLAT32(q[c], s);                                                                        \
            sums[c] = kind == WORDS ? wasm_i32x4_add(sums[c], wasm_i32x4_dot_i16x8(column, codes))                         \
                                    : wasm_i16x8_add(sums[c], dot_codes(column, codes));                                   \
        }                                                                                                                  \
    } while (0)

// Column c takes the sums of one panel.
#define FINISH(c)                                                                                                          \
    do {                                                                                                                   \
        if ((c) < n_cols) {                                                                                                \
            v128_t total = kind == WORDS ? sums[c] : kind == BYTES ? totals[c] : wasm_i32x4_extadd_pairwise_i16x8(sums[c]); \
            if (kind != WORDS && !has_min) {                                                                               \
                total = wasm_i32x4_add(total, SPLAT32(y_sum, c));                                                          \
            }                                                                                                              \
            out[c] = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(total), wasm_f32x4_mul(w->scale, SPLAT32(y_scale, c)), out[c]); \
            if (has_min) {                                                                                                 \
                out[c] = wasm_f32x4_relaxed_madd(w->min, SPLAT32(y_sum, c), out[c]);                                       \
            }                                                                                                              \
        }                                                                                                                  \
    } while (0)

// Not unrolled further: Cranelift issues all loads of a basic block first, and sixteen registers hold no more than these.
ALWAYS_INLINE void tile(int64_t n, const weight_panel * w, const activation_panel * y, v128_t * acc, int n_cols, code_kind kind,
                        bool has_min) {
    const v128_t zero = wasm_i32x4_splat(0);
    v128_t       out[N_COLS];
    for (int c = 0; c < n_cols; c++) {
        out[c] = acc[c];
    }
    for (int64_t i = 0; i < n; i++, w++, y++) {
        v128_t sums[N_COLS] = {zero, zero, zero, zero}, totals[N_COLS] = {zero, zero, zero, zero};
#pragma clang loop unroll(disable)
        for (int part = 0; part < (kind == WORDS ? 4 : 2); part++) {
            v128_t q[N_COLS];
            for (int c = 0; c < n_cols; c++) {
                q[c] = kind == WORDS ? wasm_i16x8_load8x8(y->codes[c] + 8 * part) : wasm_v128_load(y->codes[c] + 16 * part);
            }
            STEP(0);
            STEP(1);
            STEP(2);
            STEP(3);
            for (int c = 0; kind == BYTES && c < n_cols; c++) {  // 16 bits are full
                totals[c] = wasm_i32x4_add(totals[c], wasm_i32x4_extadd_pairwise_i16x8(sums[c]));
                sums[c]   = zero;
            }
        }
        const v128_t y_scale = wasm_v128_load(y->scale), y_sum = y->sum;
        FINISH(0);
        FINISH(1);
        FINISH(2);
        FINISH(3);
    }
    for (int c = 0; c < n_cols; c++) {
        acc[c] = out[c];
    }
}

// Functions, not inlined: their entries are safepoints.
#define TILES(name, kind, has_min)                                                                                         \
    static __attribute__((noinline)) void name##_1(int64_t n, const weight_panel * w, const activation_panel * y, v128_t * acc) { \
        tile(n, w, y, acc, 1, kind, has_min);                                                                              \
    }                                                                                                                      \
    static __attribute__((noinline)) void name##_2(int64_t n, const weight_panel * w, const activation_panel * y, v128_t * acc) { \
        tile(n, w, y, acc, 2, kind, has_min);                                                                              \
    }                                                                                                                      \
    static __attribute__((noinline)) void name##_4(int64_t n, const weight_panel * w, const activation_panel * y, v128_t * acc) { \
        tile(n, w, y, acc, 4, kind, has_min);                                                                              \
    }                                                                                                                      \
    const tile_set name = {name##_1, name##_2, name##_4};

TILES(pw_tiles_nibbles, NIBBLES, false)
TILES(pw_tiles_nibbles_min, NIBBLES, true)
TILES(pw_tiles_bytes, BYTES, false)
TILES(pw_tiles_bytes_min, BYTES, true)
TILES(pw_tiles_words, WORDS, false)

// 32 activations of four columns: y[c] points at their values.
ALWAYS_INLINE void copy_codes(const uint8_t * const y[N_COLS], size_t offset, activation_panel * panel) {
    for (int c = 0; c < N_COLS; c++) {
        wasm_v128_store(panel->codes[c], wasm_v128_load(y[c] + offset));
        wasm_v128_store(panel->codes[c] + 16, wasm_v128_load(y[c] + offset + 16));
    }
}

// What a code that is `bias` too large adds to each column's products, to be taken off.
ALWAYS_INLINE v128_t bias_sums(const activation_panel * panel, int bias) {
    v128_t sums[N_COLS];
    for (int c = 0; c < N_COLS; c++) {
        const v128_t a = wasm_v128_load(panel->codes[c]), b = wasm_v128_load(panel->codes[c] + 16);
        sums[c] = wasm_i32x4_extadd_pairwise_i16x8(
            wasm_i16x8_add(wasm_i16x8_extadd_pairwise_i8x16(a), wasm_i16x8_extadd_pairwise_i8x16(b)));
    }
    return wasm_i32x4_mul(sum_each(sums[0], sums[1], sums[2], sums[3]), wasm_i32x4_splat(-bias));
}

static void pack_q8_0(const uint8_t * const y[N_COLS], int bias, activation_panel * panel) {
    copy_codes(y, offsetof(block_q8_0, qs), panel);
    wasm_v128_store(panel->scale, f16_low_to_f32(load_each(y, 0)));
    panel->sum = bias_sums(panel, bias);
}

static void pack_q8_1(const uint8_t * const y[N_COLS], int bias, activation_panel * panel) {
    (void) bias;
    const v128_t head = load_each(y, 0);
    copy_codes(y, offsetof(block_q8_1, qs), panel);
    wasm_v128_store(panel->scale, f16_low_to_f32(head));
    panel->sum = f16_high_to_f32(head);
}

static void pack_q8_K(const uint8_t * const y[N_COLS], int bias, activation_panel * panels) {
    (void) bias;
    const v128_t scale = load_each(y, offsetof(block_q8_K, d));
    for (int j = 0; j < QK_K / PANEL_WEIGHTS; j++) {
        copy_codes(y, offsetof(block_q8_K, qs) + PANEL_WEIGHTS * j, &panels[j]);
        wasm_v128_store(panels[j].scale, scale);
        const v128_t pairs = load_each(y, offsetof(block_q8_K, bsums) + 4 * j);
        panels[j].sum      = wasm_f32x4_mul(scale, wasm_f32x4_convert_i32x4(wasm_i32x4_extadd_pairwise_i16x8(pairs)));
    }
}

typedef void (*pack_activations)(const uint8_t * const y[N_COLS], int bias, activation_panel * panels);

static pack_activations activations_of(enum ggml_type type) {
    return type == GGML_TYPE_Q8_0 ? pack_q8_0 : type == GGML_TYPE_Q8_1 ? pack_q8_1 : pack_q8_K;
}

// A part of the product: columns and blocks whose activations are in panels, n_panels for each four columns.
typedef struct {
    int64_t col, n_cols, block, n_blocks, n_panels;
} part;

static void pack_columns(const product * p, const part * s, int bias, activation_panel * panels) {
    const pack_activations pack  = activations_of(p->b_type);
    const size_t           bytes = ggml_type_size(p->b_type);
    for (int64_t j = 0; j < s->n_cols; j += N_COLS) {
        const uint8_t * y[N_COLS];
        for (int64_t c = 0; c < N_COLS; c++) {  // columns there are not repeat the last
            const int64_t column = j + c < s->n_cols ? j + c : s->n_cols - 1;
            y[c] = p->b + (size_t) (s->col + column) * p->b_stride + (size_t) s->block * bytes;
        }
        for (int64_t i = 0; i < s->n_blocks; i++) {
            pack(y, bias, panels + i * s->n_panels / s->n_blocks);
            for (int c = 0; c < N_COLS; c++) {
                y[c] += bytes;
            }
        }
        panels += s->n_panels;
    }
}

static void multiply_columns(const tile_set * tiles, int64_t n, const weight_panel * w, const activation_panel * y, int64_t y_stride,
                             int64_t n_cols, v128_t * acc) {
    for (int64_t j = 0; j < n_cols; j += N_COLS, y += y_stride, acc += N_COLS) {
        const int64_t       left = n_cols - j;
        const tile_function run  = left > 2 ? tiles->four : left == 2 ? tiles->two : tiles->one;
        run(n, w, y, acc);
    }
}

// The results of four rows are in acc, or go there.
static void exchange(const product * p, const part * s, int64_t row, v128_t * acc, bool is_load) {
    const int64_t n_rows = p->m - row < N_ROWS ? p->m - row : N_ROWS;
    for (int64_t j = 0; j < s->n_cols; j++) {
        float * c = p->c + (s->col + j) * p->ldc + row;
        if (is_load) {
            memcpy(&acc[j], c, (size_t) n_rows * sizeof(float));
        } else {
            memcpy(c, &acc[j], (size_t) n_rows * sizeof(float));
        }
    }
}

static void multiply_rows(const tile_format * format, const product * p, const part * s, int64_t row, const activation_panel * panels) {
    const size_t  bytes     = ggml_type_size(p->a_type);
    const int64_t per_block = s->n_panels / s->n_blocks;
    v128_t          acc[MAX_COLS + N_COLS];
    weight_panel    w[CHUNK];
    const uint8_t * x[N_ROWS];
    for (int64_t r = 0; r < N_ROWS; r++) {  // rows there are not repeat the last
        x[r] = p->a + (size_t) (row + r < p->m ? row + r : p->m - 1) * p->a_stride + (size_t) s->block * bytes;
    }
    for (int64_t j = 0; j < s->n_cols + N_COLS - 1; j++) {
        acc[j] = wasm_f32x4_splat(0.0f);
    }
    if (s->block > 0) {
        exchange(p, s, row, acc, true);
    }
    const uint8_t * next = s->n_blocks == p->k && s->col == 0 ? pw_next_rows(p, row) : NULL;  // they come next
    for (int64_t done = 0; done < s->n_panels; done += CHUNK) {
        const int64_t n = s->n_panels - done < CHUNK ? s->n_panels - done : CHUNK;
        next            = format->pack(n / per_block, x, next, w);
        multiply_columns(format->tiles, n, w, panels + done, s->n_panels, s->n_cols, acc);
    }
    exchange(p, s, row, acc, false);
}

// Rows 4 * first_group up to 4 * last_group of the product.
void pw_multiply_tiles(const tile_format * format, const product * p, int64_t first_group, int64_t last_group) {
    const int64_t    per_block = ggml_blck_size(p->a_type) / PANEL_WEIGHTS;
    activation_panel panels[N_PANELS];
    part             s = {0};
    if (first_group >= last_group) {
        return;
    }
    for (s.col = 0; s.col < p->n; s.col += MAX_COLS) {
        s.n_cols                 = p->n - s.col < MAX_COLS ? p->n - s.col : MAX_COLS;
        const int64_t max_blocks = N_PANELS / ((s.n_cols + N_COLS - 1) / N_COLS) / per_block;
        for (s.block = 0; s.block < p->k; s.block += max_blocks) {
            s.n_blocks = p->k - s.block < max_blocks ? p->k - s.block : max_blocks;
            s.n_panels = s.n_blocks * per_block;
            pack_columns(p, &s, format->bias, panels);
            for (int64_t group = first_group; group < last_group; group++) {
                multiply_rows(format, p, &s, N_ROWS * group, panels);
            }
        }
    }
}
