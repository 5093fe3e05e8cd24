// Panels (tiles.h) of strips of blocks of 256 weights: with integer scales for products (weight_panel_256), and with scales in
// f32 and q6_K's codes as 16-bit words for the expansion. Layouts of the strips: strips_256.c.
#include "strips_256.h"

// The codes of groups 2 j and 2 j + 1.
ALWAYS_INLINE void set_codes(const uint8_t * qs, const uint8_t * fifth, v128_t first[][N_GROUPS], v128_t second[][N_GROUPS],
                             bool has_fifth_bit, int j) {
    for (int i = 0; i < N_WORDS; i++) {
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t w = wasm_v128_load(qs + CELLS * i + 16 * g);
            v128_t       low = low_nibbles(w), high = high_nibbles(w);
            if (has_fifth_bit) {
                const v128_t b = wasm_v128_load(fifth + CELLS * i + 16 * g);
                low  = wasm_v128_or(low, FIFTH(b, 2 * j));
                high = wasm_v128_or(high, FIFTH(b, 2 * j + 1));
            }
            first[i][g]  = low;
            second[i][g] = high;
        }
    }
}

// --- for products ------------------------------------------------------------------------------------------------------------

// Codes of groups 2 j and 2 j + 1, whose scales and mins are behind each other at x.
ALWAYS_INLINE void set_64(const uint8_t * x, const uint8_t * fifth, weight_panel_256 * panels, bool has_fifth_bit, int j) {
    for (int g = 0; g < N_GROUPS; g++) {
        const v128_t s = wasm_u16x8_load8x8(x + 8 * g);
        panels[0].factors[g] = FIRST_OF_PAIRS(s);
        panels[1].factors[g] = SECOND_OF_PAIRS(s);
        panels[0].more[g]    = wasm_u16x8_load8x8(x + SCALES + 8 * g);
    }
    set_codes(x + 2 * SCALES, fifth, panels[0].codes, panels[1].codes, has_fifth_bit, j);
}

ALWAYS_INLINE void set_blocks(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * out, bool has_fifth_bit) {
    const size_t       part   = 2 * SCALES + N_WORDS * CELLS;
    weight_panel_256 * panels = (weight_panel_256 *) out;
    const uint8_t *    x      = rows[0];
    for (int64_t b = 0; b < n; b++) {
        load_halves(x, panels->d);
        load_halves(x + 16, panels->dmin);
        const uint8_t * fifth = x + HEAD_K;
        x += HEAD_K + (has_fifth_bit ? FIFTH_CELLS : 0);
        set_64(x, fifth, panels, has_fifth_bit, 0);
        set_64(x + part, fifth, panels + 2, has_fifth_bit, 1);
        set_64(x + 2 * part, fifth, panels + 4, has_fifth_bit, 2);
        set_64(x + 3 * part, fifth, panels + 6, has_fifth_bit, 3);
        x += 4 * part;
        panels += 2 * N_64;
    }
    rows[0] = x;
}

static void set_q4_K(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {
    set_blocks(n, x, panels, false);
}

static void set_q5_K(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {
    set_blocks(n, x, panels, true);
}

// Four rows of part (h, half): 16 weights of each of panels 4 h + 0..3.
ALWAYS_INLINE const uint8_t * set_quarter(const uint8_t * x, const v128_t s[2], weight_panel_256 * panels, int half, int g) {
    for (int k = 0; k < 4; k++) {
        v128_t * factors = half ? panels[k].more : panels[k].factors;
        factors[g]       = k % 2 ? SECOND_OF_PAIRS(s[k / 2]) : FIRST_OF_PAIRS(s[k / 2]);
    }
    for (int i = 0; i < 4; i++, x += 48) {
        v128_t codes[4];
        codes_q6_K(wasm_v128_load(x), wasm_v128_load(x + 16), wasm_v128_load(x + 32), codes);
        for (int k = 0; k < 4; k++) {
            panels[k].codes[4 * half + i][g] = codes[k];
        }
    }
    return x;
}

static void set_q6_K(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * out) {
    const uint8_t *    x      = rows[0];
    weight_panel_256 * panels = (weight_panel_256 *) out;
    for (int64_t b = 0; b < n; b++, panels += 8) {
        load_halves(x, panels->d);
        x += 16;
        for (int part = 0; part < 4; part++) {
            const uint8_t * scales = x;
            x += 2 * SCALES;
            for (int g = 0; g < N_GROUPS; g++) {
                const v128_t s[2] = {wasm_i16x8_load8x8(scales + 8 * g), wasm_i16x8_load8x8(scales + SCALES + 8 * g)};
                x = set_quarter(x, s, panels + 4 * (part / 2), part % 2, g);
            }
        }
    }
    rows[0] = x;
}

const tile_format pw_strip_tiles_q4_K = {set_q4_K, &pw_tiles_q4_K, 0, true};
const tile_format pw_strip_tiles_q5_K = {set_q5_K, &pw_tiles_q5_K, 0, true};
const tile_format pw_strip_tiles_q6_K = {set_q6_K, &pw_tiles_q6_K, 32, true};

// --- for the expansion -------------------------------------------------------------------------------------------------------

// Scales and mins of groups 2 j and 2 j + 1 of four rows.
ALWAYS_INLINE void set_scales(const uint8_t * scales, v128_t d, v128_t dmin, weight_panel * panels, int g) {
    const v128_t s = wasm_u16x8_load8x8(scales + 8 * g), m = wasm_u16x8_load8x8(scales + SCALES + 8 * g);
    const v128_t low = wasm_i32x4_splat(0xffff);
    panels[0].scale[g] = wasm_f32x4_mul(d, wasm_f32x4_convert_i32x4(wasm_v128_and(s, low)));
    panels[1].scale[g] = wasm_f32x4_mul(d, wasm_f32x4_convert_i32x4(wasm_u32x4_shr(s, 16)));
    panels[0].min[g]   = wasm_f32x4_neg(wasm_f32x4_mul(dmin, wasm_f32x4_convert_i32x4(wasm_v128_and(m, low))));
    panels[1].min[g]   = wasm_f32x4_neg(wasm_f32x4_mul(dmin, wasm_f32x4_convert_i32x4(wasm_u32x4_shr(m, 16))));
}

ALWAYS_INLINE void pack_64(const uint8_t * x, const uint8_t * fifth, const v128_t d[N_GROUPS], const v128_t dmin[N_GROUPS],
                           weight_panel * panels, bool has_fifth_bit, int j) {
    for (int g = 0; g < N_GROUPS; g++) {
        set_scales(x, d[g], dmin[g], panels, g);
    }
    set_codes(x + 2 * SCALES, fifth, panels[0].codes, panels[1].codes, has_fifth_bit, j);
}

ALWAYS_INLINE void pack_with_mins(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * panels, bool has_fifth_bit) {
    const size_t    part = 2 * SCALES + N_WORDS * CELLS;
    const uint8_t * x    = rows[0];
    for (int64_t b = 0; b < n; b++) {
        v128_t d[N_GROUPS], dmin[N_GROUPS];
        load_halves(x, d);
        load_halves(x + 16, dmin);
        const uint8_t * fifth = x + HEAD_K;
        x += HEAD_K + (has_fifth_bit ? FIFTH_CELLS : 0);
        pack_64(x, fifth, d, dmin, panels, has_fifth_bit, 0);
        pack_64(x + part, fifth, d, dmin, panels + 2, has_fifth_bit, 1);
        pack_64(x + 2 * part, fifth, d, dmin, panels + 4, has_fifth_bit, 2);
        pack_64(x + 3 * part, fifth, d, dmin, panels + 6, has_fifth_bit, 3);
        x += 4 * part;
        panels += 2 * N_64;
    }
    rows[0] = x;
}

static void pack_q4_K(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {
    pack_with_mins(n, x, panels, false);
}

static void pack_q5_K(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {
    pack_with_mins(n, x, panels, true);
}

// Four signed codes of 6 bits of every row, times their scales: as many 16-bit words in two steps of a panel.
ALWAYS_INLINE void set_words(v128_t codes, v128_t scales, v128_t steps[2][N_GROUPS], int g) {
    const v128_t q    = wasm_i8x16_sub(codes, wasm_i8x16_splat(32));
    const v128_t low  = wasm_i16x8_mul(wasm_i16x8_shr(wasm_i16x8_shl(q, 8), 8), scales);  // codes 0 and 2 of each row
    const v128_t high = wasm_i16x8_mul(wasm_i16x8_shr(q, 8), scales);                     // codes 1 and 3
    steps[0][g] = wasm_v128_or(wasm_v128_and(low, wasm_i32x4_splat(0xffff)), wasm_i32x4_shl(high, 16));
    steps[1][g] = wasm_v128_or(wasm_u32x4_shr(low, 16), wasm_v128_and(high, wasm_i32x4_splat((int32_t) 0xffff0000)));
}

static void pack_q6_K(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * panels) {
    const uint8_t * x = rows[0];
    for (int64_t b = 0; b < n; b++, panels += 8) {
        v128_t d[N_GROUPS];
        load_halves(x, d);
        for (int i = 0; i < 8; i++) {
            panels[i].scale[0] = d[0];
            panels[i].scale[1] = d[1];
        }
        x += 16;
        for (int part = 0; part < 4; part++) {
            const int       h = part / 2, half = part % 2;
            const uint8_t * scales = x;
            x += 2 * SCALES;
            for (int g = 0; g < N_GROUPS; g++) {
                const v128_t s[2] = {wasm_i16x8_load8x8(scales + 8 * g), wasm_i16x8_load8x8(scales + SCALES + 8 * g)};
                for (int i = 0; i < 4; i++, x += 48) {
                    v128_t codes[4];
                    codes_q6_K(wasm_v128_load(x), wasm_v128_load(x + 16), wasm_v128_load(x + 32), codes);
                    for (int k = 0; k < 4; k++) {
                        const v128_t scale = k % 2 ? SECOND_OF_PAIRS(s[k / 2]) : FIRST_OF_PAIRS(s[k / 2]);
                        set_words(codes[k], scale, panels[4 * h + k].codes + 8 * half + 2 * i, g);
                    }
                }
            }
        }
    }
    rows[0] = x;
}

const tile_format pw_strip_panels_q4_K = {pack_q4_K, &pw_tiles_nibbles_min, 0, true};
const tile_format pw_strip_panels_q5_K = {pack_q5_K, &pw_tiles_bytes_min, 0, true};
const tile_format pw_strip_panels_q6_K = {pack_q6_K, &pw_tiles_words, 0, true};
