// Tiles (tiles.h) of blocks of 256 weights whose groups have integer scales: q4_K, q5_K, q6_K. Products are summed in 16 bits as
// far as these go, then times the group's scale in 32 bits up to the block's end, and only there in f32: two instructions for
// each group and column instead of four, and to the last bit what one column gives (strips_256.c, strips_q6_K.c).
#include "tile_steps.h"

#define N_PANELS 8  // of a block

_Static_assert(sizeof(weight_panel_256) == sizeof(weight_panel), "one lies in the place of the other");

typedef struct {
    int  n_steps;   // that 16 bits hold the sums of
    bool has_bias;  // codes less 32, with a scale for every 16, which are mixed; else with mins
} kind_256;

// sums += products of n_steps steps times the factors. The sums are in memory: products need the registers.
ALWAYS_INLINE void add_part(const weight_step * codes, const column_step * columns, const v128_t * factors, const v128_t * start,
                            v128_t sums[N_COLS][N_GROUPS], int n_cols, int n_steps) {
    v128_t part[N_COLS][N_GROUPS];
    add_steps(n_steps, codes, columns, start, part, n_cols, NIBBLES);
    for (int c = 0; c < n_cols; c++) {
        for (int g = 0; g < N_GROUPS; g++) {
            sums[c][g] = wasm_i32x4_add(sums[c][g], wasm_i32x4_dot_i16x8(part[c][g], factors[g]));
        }
    }
}

ALWAYS_INLINE void add_panel(const weight_panel_256 * w, const activation_panel * y, v128_t sums[N_COLS][N_GROUPS], int n_cols,
                             kind_256 kind) {
    const weight_step * codes   = (const weight_step *) w->codes;
    const column_step * columns = (const column_step *) y->codes;
    add_part(codes, columns, w->factors, kind.has_bias ? y->scale : NULL, sums, n_cols, kind.n_steps);
    if (kind.n_steps < 8) {
        add_part(codes + 4, columns + 4, w->factors, kind.has_bias ? y->sum : NULL, sums, n_cols, kind.n_steps);
    }
}

// What the mins of a block add, of one column and one group of rows.
ALWAYS_INLINE v128_t sum_mins(const weight_panel_256 * w, const activation_panel * y, int c, int g) {
    v128_t sum = wasm_i32x4_dot_i16x8(y->sum[c], w->mins[g]);
    for (int i = 2; i < N_PANELS; i += 2) {
        const activation_panel * panel = next_panel(y, i, false, PANELS_MINS);
        sum                            = wasm_i32x4_add(sum, wasm_i32x4_dot_i16x8(panel->sum[c], w[i].mins[g]));
    }
    return sum;
}

ALWAYS_INLINE void add_block(const weight_panel_256 * w, const activation_panel * y, v128_t acc[][N_GROUPS],
                             v128_t sums[N_COLS][N_GROUPS], int n_cols, kind_256 kind) {
#pragma clang loop unroll(disable)
    for (int c = 0; c < n_cols; c++) {
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t scale = kind.has_bias ? y->codes[8][c] : y->scale[c];
            const v128_t sum   = wasm_f32x4_convert_i32x4(sums[c][g]);
            const v128_t out   = wasm_f32x4_relaxed_madd(sum, wasm_f32x4_mul(w->d[g], scale), acc[c][g]);
            if (kind.has_bias) {
                acc[c][g] = out;
            } else {
                const v128_t mins = wasm_f32x4_convert_i32x4(sum_mins(w, y, c, g));
                acc[c][g]         = wasm_f32x4_relaxed_nmadd(mins, wasm_f32x4_mul(w->dmin[g], scale), out);
            }
        }
    }
}

ALWAYS_INLINE void tile_256(int64_t n, const weight_panel * panels, const activation_panel * y, v128_t acc[][N_GROUPS],
                            read_ahead * ahead, int n_cols, kind_256 kind) {
    const activation_kind    activations = kind.has_bias ? PANELS_BIASES : PANELS_MINS;
    const weight_panel_256 * w           = (const weight_panel_256 *) panels;
    v128_t                   memory[N_COLS][N_GROUPS];
    for (int64_t block = 0; block < n; block += N_PANELS, w += N_PANELS, y = next_panel(y, N_PANELS, false, activations)) {
        const weight_panel_256 * panel   = w;
        const activation_panel * columns = y;
        v128_t(*sums)[N_GROUPS]          = memory;
        v128_t zero                      = wasm_i32x4_splat(0);
        OPAQUE(sums);
        OPAQUE(zero);  // else a call would fill them
        for (int i = 0; i < n_cols * N_GROUPS; i++) {
            sums[i / N_GROUPS][i % N_GROUPS] = zero;
        }
#pragma clang loop unroll(disable)
        for (int i = 0; i < N_PANELS; i++) {
            fetch(ahead);
            OPAQUE(panel);
            OPAQUE(columns);
            add_panel(panel, columns, sums, n_cols, kind);
            panel++;
            columns = next_panel(columns, 1, false, activations);
        }
        add_block(w, y, acc, sums, n_cols, kind);
    }
}

// Functions, not inlined: their entries are safepoints.
#define TILE(name, n_cols, kind)                                                                                           \
    static __attribute__((noinline)) void name(int64_t n, const weight_panel * w, const activation_panel * y,              \
                                               v128_t acc[][N_GROUPS], read_ahead * ahead) {                               \
        tile_256(n, w, y, acc, ahead, n_cols, kind);                                                                       \
    }

#define TILES_256(name, steps, has_bias)                                                                                   \
    TILE(name##_1, 1, ((kind_256) {steps, has_bias}))                                                                      \
    TILE(name##_2, 2, ((kind_256) {steps, has_bias}))                                                                      \
    TILE(name##_4, 4, ((kind_256) {steps, has_bias}))                                                                      \
    const tile_set name = {name##_1, name##_2, name##_4, false, has_bias ? PANELS_BIASES : PANELS_MINS};

TILES_256(pw_tiles_q4_K, 8, false)
TILES_256(pw_tiles_q5_K, 4, false)
TILES_256(pw_tiles_q6_K, 4, true)
