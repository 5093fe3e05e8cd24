// Panels (tiles.h) of q3_K and iq4_xs, whose codes are multiplied by their groups' scales into 16 bits, and of mxfp4. Layouts:
// rows_256_small.c, rows_32.c.
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-quants.h"
#include "codes.h"
#include "panels.h"

// Sixteen signed codes of each row times a scale of each row.
ALWAYS_INLINE void set_words(const v128_t codes[N_ROWS], const int8_t scales[N_ROWS], v128_t words[8][N_GROUPS], int group) {
    v128_t low[N_ROWS], high[N_ROWS];
    for (int r = 0; r < N_ROWS; r++) {
        const v128_t scale = wasm_i16x8_splat(scales[r]);
        low[r]             = wasm_i16x8_mul(wasm_i16x8_extend_low_i8x16(codes[r]), scale);
        high[r]            = wasm_i16x8_mul(wasm_i16x8_extend_high_i8x16(codes[r]), scale);
    }
    interleave(low, words, group);
    interleave(high, words + 4, group);
}

// Weights 128 h + 32 k + 16 g + 0..15, less 4.
ALWAYS_INLINE v128_t q3_K_codes(const uint8_t * x, int h, int k, int g) {
    const v128_t bytes = wasm_v128_load(x + offsetof(block_q3_K, qs) + 32 * h + 16 * g);
    const v128_t bits  = wasm_v128_load(x + offsetof(block_q3_K, hmask) + 16 * g);
    const v128_t low   = wasm_v128_and(wasm_u16x8_shr(bytes, 2 * k), wasm_i8x16_splat(3));
    const v128_t third = wasm_i8x16_splat((int8_t) (1 << (4 * h + k)));
    const v128_t unset = wasm_i8x16_eq(wasm_v128_and(bits, third), wasm_i8x16_splat(0));
    return wasm_i8x16_sub(low, wasm_v128_and(unset, wasm_i8x16_splat(4)));
}

ALWAYS_INLINE void pack_q3_K(const uint8_t * const x[N_ROWS], weight_panel * panels, int group) {
    const v128_t d = f16_high_to_f32(load_each(x, offsetof(block_q3_K, d) - 2));
    int8_t       scales[N_ROWS][16];
    for (int r = 0; r < N_ROWS; r++) {
        wasm_v128_store(scales[r], unpack_scales_q3_K(x[r] + offsetof(block_q3_K, scales)));
    }
    for (int i = 0; i < 16; i++) {
        const int    h = i / 8, k = i / 2 % 4, g = i % 2;
        v128_t       codes[N_ROWS];
        const int8_t own[N_ROWS] = {scales[0][i], scales[1][i], scales[2][i], scales[3][i]};
        for (int r = 0; r < N_ROWS; r++) {
            codes[r] = q3_K_codes(x[r], h, k, g);
        }
        set_words(codes, own, panels[i / 2].codes + 8 * g, group);
        panels[i / 2].scale[group] = d;
    }
}

ALWAYS_INLINE void pack_iq4_xs(const uint8_t * const x[N_ROWS], weight_panel * panels, int group) {
    const v128_t table = wasm_v128_load(kvalues_iq4nl), d = f16_low_to_f32(load_each(x, 0));
    int16_t      scales[N_ROWS][8];
    for (int r = 0; r < N_ROWS; r++) {
        wasm_v128_store(scales[r], unpack_scales_iq4_xs(x[r]));
    }
    for (int j = 0; j < 8; j++) {
        v128_t       low[N_ROWS], high[N_ROWS];
        const int8_t own[N_ROWS] = {(int8_t) scales[0][j], (int8_t) scales[1][j], (int8_t) scales[2][j], (int8_t) scales[3][j]};
        for (int r = 0; r < N_ROWS; r++) {
            const v128_t bytes = wasm_v128_load(x[r] + offsetof(block_iq4_xs, qs) + 16 * j);
            low[r]             = wasm_i8x16_relaxed_swizzle(table, low_nibbles(bytes));
            high[r]            = wasm_i8x16_relaxed_swizzle(table, high_nibbles(bytes));
        }
        set_words(low, own, panels[j].codes, group);
        set_words(high, own, panels[j].codes + 8, group);
        panels[j].scale[group] = d;
    }
}

ALWAYS_INLINE void pack_mxfp4(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    const v128_t table = wasm_i8x16_add(wasm_v128_load(kvalues_mxfp4), wasm_i8x16_splat(12));
    v128_t       bytes[N_ROWS], turned[4];
    panel->scale[group] = e8m0_to_f32(load_each(x, 0));
    for (int r = 0; r < N_ROWS; r++) {
        bytes[r] = wasm_v128_load(x[r] + offsetof(block_mxfp4, qs));
    }
    turn(bytes, turned);
    for (int i = 0; i < 4; i++) {
        panel->codes[i][group]     = wasm_i8x16_relaxed_swizzle(table, low_nibbles(turned[i]));
        panel->codes[4 + i][group] = wasm_i8x16_relaxed_swizzle(table, high_nibbles(turned[i]));
    }
}

TILE_FORMAT(pw_tile_q3_K, block_q3_K, QK_K / PANEL_WEIGHTS, pack_q3_K, pw_tiles_words, 0)
TILE_FORMAT(pw_tile_iq4_xs, block_iq4_xs, QK_K / PANEL_WEIGHTS, pack_iq4_xs, pw_tiles_words, 0)
TILE_FORMAT(pw_tile_mxfp4, block_mxfp4, 1, pack_mxfp4, pw_tiles_nibbles, 12)
