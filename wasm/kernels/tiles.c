// The tiles (see tiles.h), the activations' panels, and the loops around both.
//
// Activations of up to 64 columns are brought into panels that stay in the second-level cache, then eight rows of weights at a
// time are unpacked, some kilobytes at once, and multiplied with all of these columns.
#include "tile_steps.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#define MAX_COLS 64         // together in panels
#define ALL_PANELS 368640   // bytes of activations' panels, on the stack
#define CHUNK 32            // panels of weights unpacked at a time: 18 KB

// The sums of one panel in 32 bits.
ALWAYS_INLINE void multiply_panel(const weight_panel * w, const activation_panel * y, v128_t sums[N_COLS][N_GROUPS], int n_cols,
                                  code_kind kind, bool has_min) {
    const weight_step * codes   = (const weight_step *) w->codes;
    const column_step * columns = (const column_step *) y->codes;
    if (kind == BYTES) {  // 16 bits hold four steps
        v128_t first[N_COLS][N_GROUPS];
        add_steps(4, codes, columns, NULL, first, n_cols, kind);
        for (int i = 0; i < n_cols * N_GROUPS; i++) {
            first[i / N_GROUPS][i % N_GROUPS] = wasm_i32x4_extadd_pairwise_i16x8(first[i / N_GROUPS][i % N_GROUPS]);
        }
        add_steps(4, codes + 4, columns + 4, NULL, sums, n_cols, kind);
        for (int i = 0; i < n_cols * N_GROUPS; i++) {
            v128_t * sum = &sums[i / N_GROUPS][i % N_GROUPS];
            *sum         = wasm_i32x4_add(first[i / N_GROUPS][i % N_GROUPS], wasm_i32x4_extadd_pairwise_i16x8(*sum));
        }
        return;
    }
    add_steps(kind == WORDS ? 16 : 8, codes, columns, kind == NIBBLES && !has_min ? y->sum : NULL, sums, n_cols, kind);
    for (int i = 0; kind == NIBBLES && i < n_cols * N_GROUPS; i++) {
        v128_t * sum = &sums[i / N_GROUPS][i % N_GROUPS];
        *sum         = wasm_i32x4_extadd_pairwise_i16x8(*sum);
    }
}

ALWAYS_INLINE void tile(int64_t n, const weight_panel * w, const activation_panel * y, v128_t acc[][N_GROUPS],
                        read_ahead * ahead, int n_cols, code_kind kind, bool has_min) {
    for (int64_t i = 0; i < n; i++, w++, y = next_panel(y, 1, kind == WORDS, PANELS)) {
        v128_t sums[N_COLS][N_GROUPS];
        fetch(ahead);
        multiply_panel(w, y, sums, n_cols, kind, has_min);
        const v128_t scales[N_GROUPS] = {w->scale[0], w->scale[1]};  // else read again behind every store
        for (int c = 0; c < n_cols; c++) {
            const v128_t y_scale = y->scale[c], y_sum = y->sum[c];
            for (int g = 0; g < N_GROUPS; g++) {
                const v128_t scale = wasm_f32x4_mul(scales[g], y_scale);
                const v128_t out   = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(sums[c][g]), scale, acc[c][g]);
                acc[c][g]          = has_min ? wasm_f32x4_relaxed_madd(w->min[g], y_sum, out) : out;
            }
        }
    }
}

// Functions, not inlined: their entries are safepoints.
#define TILE(name, n_cols, kind, has_min)                                                                                  \
    static __attribute__((noinline)) void name(int64_t n, const weight_panel * w, const activation_panel * y,              \
                                               v128_t acc[][N_GROUPS], read_ahead * ahead) {                               \
        tile(n, w, y, acc, ahead, n_cols, kind, has_min);                                                                  \
    }

#define TILES(name, kind, has_min)                                                                                         \
    TILE(name##_1, 1, kind, has_min)                                                                                       \
    TILE(name##_2, 2, kind, has_min)                                                                                       \
    TILE(name##_4, 4, kind, has_min)                                                                                       \
    const tile_set name = {name##_1, name##_2, name##_4, kind == WORDS, PANELS};

TILES(pw_tiles_nibbles, NIBBLES, false)
TILES(pw_tiles_nibbles_min, NIBBLES, true)
TILES(pw_tiles_bytes_min, BYTES, true)
TILES(pw_tiles_words, WORDS, false)

// Put four 32-bit parts of each column's codes into a panel from its step `first` on.
ALWAYS_INLINE void set_steps(activation_panel * panel, int first, const v128_t codes[N_COLS]) {
    for (int c = 0; c < N_COLS; c++) {
        panel->codes[first][c]     = SPLAT32(codes[c], 0);
        panel->codes[first + 1][c] = SPLAT32(codes[c], 1);
        panel->codes[first + 2][c] = SPLAT32(codes[c], 2);
        panel->codes[first + 3][c] = SPLAT32(codes[c], 3);
    }
}

// 32 activations of four columns: y[c] points at their values.
ALWAYS_INLINE void set_codes(const uint8_t * const y[N_COLS], size_t offset, bool has_words, activation_panel * panel) {
    for (int half = 0; half < 2; half++) {
        v128_t codes[N_COLS], low[N_COLS], high[N_COLS];
        for (int c = 0; c < N_COLS; c++) {
            codes[c] = wasm_v128_load(y[c] + offset + 16 * half);
            low[c]   = wasm_i16x8_extend_low_i8x16(codes[c]);
            high[c]  = wasm_i16x8_extend_high_i8x16(codes[c]);
        }
        if (has_words) {
            set_steps(panel, 8 * half, low);
            set_steps(panel, 8 * half + 4, high);
        } else {
            set_steps(panel, 4 * half, codes);
        }
    }
}

ALWAYS_INLINE void repeat(v128_t values, v128_t out[N_COLS]) {
    out[0] = SPLAT32(values, 0);
    out[1] = SPLAT32(values, 1);
    out[2] = SPLAT32(values, 2);
    out[3] = SPLAT32(values, 3);
}

// The sums of each column's four pairs of 16-bit lanes, a pair in each lane of 32 bits.
ALWAYS_INLINE v128_t sum_each_pair(const v128_t v[N_COLS]) {
    const v128_t ab = wasm_i16x8_add(wasm_i32x4_shuffle(v[0], v[1], 0, 2, 4, 6), wasm_i32x4_shuffle(v[0], v[1], 1, 3, 5, 7));
    const v128_t cd = wasm_i16x8_add(wasm_i32x4_shuffle(v[2], v[3], 0, 2, 4, 6), wasm_i32x4_shuffle(v[2], v[3], 1, 3, 5, 7));
    return wasm_i16x8_add(wasm_i32x4_shuffle(ab, cd, 0, 2, 4, 6), wasm_i32x4_shuffle(ab, cd, 1, 3, 5, 7));
}

// What codes that are `bias` too large add to the two 16-bit lanes of each column's sums, to be taken off; of sums of pairs of
// activations. Sums may overflow on the way: what counts is that codes less their bias add up to 16 bits.
ALWAYS_INLINE v128_t lane_biases(const v128_t pairs[N_COLS], int bias) {
    return wasm_i16x8_mul(sum_each_pair(pairs), wasm_i16x8_splat((int16_t) -bias));
}

static void pack_q8_0(const uint8_t * const y[N_COLS], const tile_format * format, activation_panel * panel) {
    v128_t pairs[N_COLS];
    for (int c = 0; c < N_COLS; c++) {
        const uint8_t * q = y[c] + offsetof(block_q8_0, qs);
        pairs[c] = wasm_i16x8_add(wasm_i16x8_extadd_pairwise_i8x16(wasm_v128_load(q)),
                                  wasm_i16x8_extadd_pairwise_i8x16(wasm_v128_load(q + 16)));
    }
    set_codes(y, offsetof(block_q8_0, qs), format->tiles->has_words, panel);
    repeat(f16_low_to_f32(load_each(y, 0)), panel->scale);
    repeat(lane_biases(pairs, format->bias), panel->sum);
}

static void pack_q8_1(const uint8_t * const y[N_COLS], const tile_format * format, activation_panel * panel) {
    const v128_t head = load_each(y, 0);
    set_codes(y, offsetof(block_q8_1, qs), format->tiles->has_words, panel);
    repeat(f16_low_to_f32(head), panel->scale);
    repeat(f16_high_to_f32(head), panel->sum);
}

static void pack_q8_K(const uint8_t * const y[N_COLS], const tile_format * format, activation_panel * panel) {
    const v128_t scale = load_each(y, offsetof(block_q8_K, d));
    for (int j = 0; j < QK_K / PANEL_WEIGHTS; j++) {
        const v128_t pairs = load_each(y, offsetof(block_q8_K, bsums) + 4 * j);
        set_codes(y, offsetof(block_q8_K, qs) + PANEL_WEIGHTS * j, format->tiles->has_words, panel);
        repeat(scale, panel->scale);
        repeat(wasm_f32x4_mul(scale, wasm_f32x4_convert_i32x4(wasm_i32x4_extadd_pairwise_i16x8(pairs))), panel->sum);
        panel = (activation_panel *) next_panel(panel, 1, format->tiles->has_words, PANELS);
    }
}

// The sums of 32 activations of each column, from one on, as 16-bit lanes: low halves from the first, high ones from the next.
ALWAYS_INLINE v128_t sums_of_32(const uint8_t * const y[N_COLS], int j) {
    const size_t at  = offsetof(block_q8_K, bsums) + 4 * (size_t) j;
    const v128_t one  = wasm_i32x4_extadd_pairwise_i16x8(load_each(y, at));
    const v128_t next = wasm_i32x4_extadd_pairwise_i16x8(load_each(y, at + 4));
    return wasm_v128_or(wasm_v128_and(one, wasm_i32x4_splat(0xffff)), wasm_i32x4_shl(next, 16));
}

static void pack_q8_K_for_mins(const uint8_t * const y[N_COLS], const tile_format * format, activation_panel * panel) {
    const v128_t scale = load_each(y, offsetof(block_q8_K, d));
    for (int j = 0; j < QK_K / PANEL_WEIGHTS; j++) {
        set_codes(y, offsetof(block_q8_K, qs) + PANEL_WEIGHTS * j, false, panel);
        repeat(scale, panel->scale);
        if (j % 2 == 0) {
            repeat(sums_of_32(y, j), panel->sum);
        }
        panel = (activation_panel *) next_panel(panel, 1, false, format->tiles->activations);
    }
}

// Four steps, and what is to be added to their products.
ALWAYS_INLINE void set_steps_with_biases(const v128_t codes[N_COLS], int bias, activation_panel * panel, int first,
                                         v128_t out[N_COLS]) {
    v128_t pairs[N_COLS];
    for (int c = 0; c < N_COLS; c++) {
        pairs[c] = wasm_i16x8_extadd_pairwise_i8x16(codes[c]);
    }
    set_steps(panel, first, codes);
    repeat(lane_biases(pairs, bias), out);
}

static void pack_q8_K_with_biases(const uint8_t * const y[N_COLS], const tile_format * format, activation_panel * panel) {
    const v128_t scale = load_each(y, offsetof(block_q8_K, d));
    for (int j = 0; j < QK_K / PANEL_WEIGHTS; j++) {
        v128_t first[N_COLS], last[N_COLS];
        for (int c = 0; c < N_COLS; c++) {
            const uint8_t * q = y[c] + offsetof(block_q8_K, qs) + PANEL_WEIGHTS * (size_t) j;
            v128_t          mixed[2];
            mix_groups(wasm_v128_load(q), wasm_v128_load(q + 16), mixed);
            first[c] = mixed[0];
            last[c]  = mixed[1];
        }
        set_steps_with_biases(first, format->bias, panel, 0, panel->scale);
        set_steps_with_biases(last, format->bias, panel, 4, panel->sum);
        repeat(scale, panel->codes[8]);
        panel = (activation_panel *) next_panel(panel, 1, false, format->tiles->activations);
    }
}

typedef void (*pack_activations)(const uint8_t * const y[N_COLS], const tile_format * format, activation_panel * panels);

static pack_activations activations_of(enum ggml_type type, activation_kind kind) {
    switch (kind) {
        case PANELS_MINS: return pack_q8_K_for_mins;
        case PANELS_BIASES: return pack_q8_K_with_biases;
        default: return type == GGML_TYPE_Q8_0 ? pack_q8_0 : type == GGML_TYPE_Q8_1 ? pack_q8_1 : pack_q8_K;
    }
}

// A part of the product: columns and blocks whose activations are in panels, n_panels for each four columns.
typedef struct {
    int64_t col, n_cols, block, n_blocks, n_panels, per_block;
    size_t  block_bytes;  // of weights
    bool    is_dense;     // whole rows, one behind another, that are read for the first time
} part;

static void pack_columns(const product * p, const part * s, const tile_format * format, char * panels) {
    const pack_activations pack  = activations_of(p->b_type, format->tiles->activations);
    const size_t           bytes = ggml_type_size(p->b_type);
    const size_t           panel = activation_panel_size(format->tiles->has_words, format->tiles->activations);
    const size_t           step  = panel * (size_t) s->per_block;
    for (int64_t j = 0; j < s->n_cols; j += N_COLS) {
        const uint8_t * y[N_COLS];
        for (int64_t c = 0; c < N_COLS; c++) {  // columns there are not repeat the last
            const int64_t column = j + c < s->n_cols ? j + c : s->n_cols - 1;
            y[c] = p->b + (size_t) (s->col + column) * p->b_stride + (size_t) s->block * bytes;
        }
        for (int64_t i = 0; i < s->n_blocks; i++, panels += step) {
            pack(y, format, (activation_panel *) panels);
            for (int c = 0; c < N_COLS; c++) {
                y[c] += bytes;
            }
        }
    }
}

// y: the panels of the first four columns, those of the next are n_panels further on.
static void multiply_columns(const tile_set * tiles, int64_t n, const weight_panel * w, const activation_panel * y, const part * s,
                             v128_t acc[][N_GROUPS], read_ahead * ahead) {
    for (int64_t j = 0; j < s->n_cols; j += N_COLS, y = next_panel(y, s->n_panels, tiles->has_words, tiles->activations)) {
        const int64_t       left = s->n_cols - j;
        const tile_function run  = left > 2 ? tiles->four : left == 2 ? tiles->two : tiles->one;
        run(n, w, y, acc + j, ahead);
    }
}

// The results of n_rows rows are in acc, or go there. Eight rows are nearly always all there, and a call of memcpy takes as long
// as a panel's products.
static void exchange(const product * p, const part * s, int64_t row, int64_t n_rows, v128_t acc[][N_GROUPS], bool is_load) {
    float * c = p->c + s->col * p->ldc + row;
    for (int64_t j = 0; j < s->n_cols; j++, c += p->ldc) {
        if (n_rows < PANEL_ROWS) {
            memcpy(is_load ? (void *) acc[j] : c, is_load ? c : (const void *) acc[j], (size_t) n_rows * sizeof(float));
        } else if (is_load) {
            acc[j][0] = wasm_v128_load(c);
            acc[j][1] = wasm_v128_load(c + N_ROWS);
        } else {
            wasm_v128_store(c, acc[j][0]);
            wasm_v128_store(c + N_ROWS, acc[j][1]);
        }
    }
}

static void multiply_rows(const tile_format * format, const product * p, const part * s, int64_t row, int64_t n_rows, const char * panels) {
    v128_t          acc[MAX_COLS + N_COLS][N_GROUPS];
    weight_panel    w[CHUNK];
    const uint8_t * x[PANEL_ROWS];
    const size_t    skipped = (size_t) s->block * s->block_bytes;
    for (int64_t r = 0; r < PANEL_ROWS; r++) {  // rows there are not repeat the last; a strip has no rows
        x[r] = p->a + (size_t) (row + (r < n_rows ? r : n_rows - 1)) * p->a_stride + (format->is_strips ? PANEL_ROWS : 1) * skipped;
    }
    for (int64_t j = 0; j < s->n_cols + N_COLS - 1; j++) {
        acc[j][0] = acc[j][1] = wasm_f32x4_splat(0.0f);
    }
    if (s->block > 0) {
        exchange(p, s, row, n_rows, acc, true);
    }
    const int64_t n_tiles = (s->n_cols + N_COLS - 1) / N_COLS;
    read_ahead    ahead   = {.n_bytes = PANEL_ROWS * s->block_bytes / (size_t) (s->per_block * n_tiles) + 1};
    if (s->is_dense && row + PANEL_ROWS < p->m) {  // the next rows follow
        const int64_t n_next = p->m - row - PANEL_ROWS < PANEL_ROWS ? p->m - row - PANEL_ROWS : PANEL_ROWS;
        ahead.at  = p->a + (size_t) (row + PANEL_ROWS) * p->a_stride;
        ahead.end = ahead.at + (size_t) n_next * p->a_stride;
    }
    const tile_set * tiles = format->tiles;
    for (int64_t done = 0; done < s->n_panels; done += CHUNK) {
        const int64_t            n = s->n_panels - done < CHUNK ? s->n_panels - done : CHUNK;
        const activation_panel * y = next_panel((const activation_panel *) panels, done, tiles->has_words, tiles->activations);
        format->pack(n / s->per_block, x, w);
        multiply_columns(tiles, n, w, y, s, acc, &ahead);
    }
    exchange(p, s, row, n_rows, acc, false);
}

// Groups `first` to `last`, with the part's activations in panels.
static void multiply_share(const tile_format * format, const product * p, const part * s, int64_t first, int64_t last, const char * panels) {
    const int64_t last_row = N_ROWS * last < p->m ? N_ROWS * last : p->m;
    for (int64_t row = N_ROWS * first; row < last_row; row += PANEL_ROWS) {
        multiply_rows(format, p, s, row, last_row - row < PANEL_ROWS ? last_row - row : PANEL_ROWS, panels);
    }
}

// Shares of rows with one turn for each MAX_COLS columns. Where rows take several parts every share packs the activations of
// each part anew, so there are fewer.
static row_shares shares_of(const struct ggml_compute_params * params, const product * p, bool has_parts) {
    row_shares shares = pw_row_shares(params, p, true);
    shares.n_turns = (p->n + MAX_COLS - 1) / MAX_COLS;
    if (has_parts && shares.n_shares > 2 * params->nth) {
        shares.n_shares = 2 * params->nth;
    }
    return shares;
}

void pw_multiply_tiles(const tile_format * format, const struct ggml_compute_params * params, const product * p) {
    const size_t  panel_bytes = activation_panel_size(format->tiles->has_words, format->tiles->activations);
    const int64_t n_fitting   = ALL_PANELS / (int64_t) panel_bytes;
    _Alignas(16) char panels[ALL_PANELS];
    part s = {.per_block = ggml_blck_size(p->a_type) / PANEL_WEIGHTS, .n_cols = p->n < MAX_COLS ? p->n : MAX_COLS,
              .block_bytes = format->is_strips ? p->a_stride / (size_t) p->k : ggml_type_size(p->a_type)};
    const int64_t max_blocks = n_fitting / ((s.n_cols + N_COLS - 1) / N_COLS) / s.per_block;
    row_shares    shares     = shares_of(params, p, p->k > max_blocks);
    int64_t       first, last, packed = -1;
    while (pw_next_share(&shares, &first, &last)) {
        s.col    = MAX_COLS * shares.turn;
        s.n_cols = p->n - s.col < MAX_COLS ? p->n - s.col : MAX_COLS;
        for (s.block = 0; s.block < p->k; s.block += max_blocks) {
            s.n_blocks = p->k - s.block < max_blocks ? p->k - s.block : max_blocks;
            s.n_panels = s.n_blocks * s.per_block;
            s.is_dense = s.n_blocks == p->k && s.col == 0 && p->a_stride == (size_t) p->k * s.block_bytes;
            if (packed != shares.turn || p->k > max_blocks) {
                pack_columns(p, &s, format, panels);
                packed = shares.turn;
            }
            multiply_share(format, p, &s, first, last, panels);
        }
    }
}
