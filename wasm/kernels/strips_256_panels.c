// Panels (tiles.h) of strips of blocks of 256 weights: with integer scales for products (weight_panel_256), and with scales in
// f32 and q6_K's codes as 16-bit words for the expansion. Layouts of the strips: strips_256.c, strips_q6_K.c.
#include "strips_256.h"
#include "tight_codes.h"

// --- q4_K and q5_K -----------------------------------------------------------------------------------------------------------

// Bytes of groups 2 j and 2 j + 1, with their scales and mins.
ALWAYS_INLINE size_t bytes_of_64(bool is_q5_K) {
    return 2 * SCALES + (is_q5_K ? 2 * N_GROUPS * GROUP_5 : N_WORDS * CELLS);
}

ALWAYS_INLINE void set_nibbles(const uint8_t * x, v128_t first[][N_GROUPS], v128_t second[][N_GROUPS]) {
    for (int i = 0; i < N_WORDS * N_GROUPS; i++) {
        const v128_t w = wasm_v128_load(x + 16 * i);
        first[i / N_GROUPS][i % N_GROUPS]  = low_nibbles(w);
        second[i / N_GROUPS][i % N_GROUPS] = high_nibbles(w);
    }
}

ALWAYS_INLINE void set_codes(const uint8_t * x, v128_t first[][N_GROUPS], v128_t second[][N_GROUPS], bool is_q5_K) {
    if (!is_q5_K) {
        set_nibbles(x, first, second);
        return;
    }
    for (int g = 0; g < N_GROUPS; g++, x += 2 * GROUP_5) {
        set_five_bits(x, first, g);
        set_five_bits(x + GROUP_5, second, g);
    }
}

// For products.
ALWAYS_INLINE void set_blocks(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * out, bool is_q5_K) {
    weight_panel_256 * panels = (weight_panel_256 *) out;
    const uint8_t *    x      = rows[0];
    for (int64_t b = 0; b < n; b++) {
        load_halves(x, panels->d);
        load_halves(x + 16, panels->dmin);
        x += HEAD_K;
        for (int j = 0; j < N_64; j++, x += bytes_of_64(is_q5_K), panels += 2) {
            for (int g = 0; g < N_GROUPS; g++) {
                const v128_t s = wasm_u16x8_load8x8(x + 8 * g);
                panels[0].factors[g] = FIRST_OF_PAIRS(s);
                panels[1].factors[g] = SECOND_OF_PAIRS(s);
                panels[0].mins[g]    = wasm_u16x8_load8x8(x + SCALES + 8 * g);
            }
            set_codes(x + 2 * SCALES, panels[0].codes, panels[1].codes, is_q5_K);
        }
    }
    rows[0] = x;
}

// Scales and mins of groups 2 j and 2 j + 1 of four rows.
ALWAYS_INLINE void set_scales(const uint8_t * scales, v128_t d, v128_t dmin, weight_panel * panels, int g) {
    const v128_t s = wasm_u16x8_load8x8(scales + 8 * g), m = wasm_u16x8_load8x8(scales + SCALES + 8 * g);
    const v128_t low = wasm_i32x4_splat(0xffff);
    panels[0].scale[g] = wasm_f32x4_mul(d, wasm_f32x4_convert_i32x4(wasm_v128_and(s, low)));
    panels[1].scale[g] = wasm_f32x4_mul(d, wasm_f32x4_convert_i32x4(wasm_u32x4_shr(s, 16)));
    panels[0].min[g]   = wasm_f32x4_neg(wasm_f32x4_mul(dmin, wasm_f32x4_convert_i32x4(wasm_v128_and(m, low))));
    panels[1].min[g]   = wasm_f32x4_neg(wasm_f32x4_mul(dmin, wasm_f32x4_convert_i32x4(wasm_u32x4_shr(m, 16))));
}

// For the expansion.
ALWAYS_INLINE void pack_blocks(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * panels, bool is_q5_K) {
    const uint8_t * x = rows[0];
    for (int64_t b = 0; b < n; b++) {
        v128_t d[N_GROUPS], dmin[N_GROUPS];
        load_halves(x, d);
        load_halves(x + 16, dmin);
        x += HEAD_K;
        for (int j = 0; j < N_64; j++, x += bytes_of_64(is_q5_K), panels += 2) {
            for (int g = 0; g < N_GROUPS; g++) {
                set_scales(x, d[g], dmin[g], panels, g);
            }
            set_codes(x + 2 * SCALES, panels[0].codes, panels[1].codes, is_q5_K);
        }
    }
    rows[0] = x;
}

static void set_q4_K(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {
    set_blocks(n, x, panels, false);
}

static void set_q5_K(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {
    set_blocks(n, x, panels, true);
}

static void pack_q4_K(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {
    pack_blocks(n, x, panels, false);
}

static void pack_q5_K(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {
    pack_blocks(n, x, panels, true);
}

const tile_format pw_strip_tiles_q4_K  = {set_q4_K, &pw_tiles_q4_K, 0, true};
const tile_format pw_strip_tiles_q5_K  = {set_q5_K, &pw_tiles_q5_K, 0, true};
const tile_format pw_strip_panels_q4_K = {pack_q4_K, &pw_tiles_nibbles_min, 0, true};
const tile_format pw_strip_panels_q5_K = {pack_q5_K, &pw_tiles_bytes_min, 0, true};

// --- q6_K --------------------------------------------------------------------------------------------------------------------

// Groups stay mixed: so do the activations (PANELS_BIASES).
static void set_q6_K(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * out) {
    const uint8_t *    x      = rows[0];
    weight_panel_256 * panels = (weight_panel_256 *) out;
    for (int64_t b = 0; b < n; b++) {
        load_halves(x, panels->d);
        x += 16;
        for (int i = 0; i < 2 * N_64; i++, panels++) {
            const uint8_t * scales = x;
            x += SCALES;
            for (int g = 0; g < N_GROUPS; g++) {
                panels->factors[g] = wasm_i16x8_load8x8(scales + 8 * g);
                for (int step = 0; step < N_WORDS; step += 4, x += CELL_6) {
                    v128_t codes[4];
                    codes_of_six(x, codes);
                    for (int k = 0; k < 4; k++) {
                        panels->codes[step + k][g] = codes[k];
                    }
                }
            }
        }
    }
    rows[0] = x;
}

// Two codes of 6 bits of each group and row, times their scales: as many 16-bit words in a step of each group.
ALWAYS_INLINE void set_words(v128_t codes, v128_t scales, v128_t * first, v128_t * second) {
    const v128_t q    = wasm_i8x16_sub(codes, wasm_i8x16_splat(BIAS_6));
    const v128_t low  = wasm_i16x8_mul(wasm_i16x8_shr(wasm_i16x8_shl(q, 8), 8), scales);  // the first code of each group
    const v128_t high = wasm_i16x8_mul(wasm_i16x8_shr(q, 8), scales);                     // the second
    *first  = wasm_v128_or(wasm_v128_and(low, wasm_i32x4_splat(0xffff)), wasm_i32x4_shl(high, 16));
    *second = wasm_v128_or(wasm_u32x4_shr(low, 16), wasm_v128_and(high, wasm_i32x4_splat((int32_t) 0xffff0000)));
}

static void pack_q6_K(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * panels) {
    const uint8_t * x = rows[0];
    for (int64_t b = 0; b < n; b++) {
        v128_t d[N_GROUPS];
        load_halves(x, d);
        x += 16;
        for (int i = 0; i < 2 * N_64; i++, panels++) {
            const uint8_t * scales = x;
            x += SCALES;
            for (int g = 0; g < N_GROUPS; g++) {
                const v128_t s = wasm_i16x8_load8x8(scales + 8 * g);
                panels->scale[g] = d[g];
                for (int step = 0; step < N_WORDS; step += 4, x += CELL_6) {
                    v128_t codes[4];
                    codes_of_six(x, codes);
                    for (int k = 0; k < 4; k++) {
                        set_words(codes[k], s, &panels->codes[step + k][g], &panels->codes[N_WORDS + step + k][g]);
                    }
                }
            }
        }
    }
    rows[0] = x;
}

const tile_format pw_strip_tiles_q6_K  = {set_q6_K, &pw_tiles_q6_K, BIAS_6, true};
const tile_format pw_strip_panels_q6_K = {pack_q6_K, &pw_tiles_words, 0, true};
