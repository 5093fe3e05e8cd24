// Panels (tiles.h) of weights in blocks of 256: q4_K, q5_K, q6_K. Layouts: rows_256.c.
#include "codes.h"
#include "panels.h"

#define N_PANELS (QK_K / PANEL_WEIGHTS)

// Scales and mins of the eight groups: the block's own, times those of the group.
ALWAYS_INLINE void set_scales_and_mins(const uint8_t * const x[N_ROWS], weight_panel * panels, int group) {
    const v128_t head = load_each(x, 0), d = f16_low_to_f32(head), dmin = wasm_f32x4_neg(f16_high_to_f32(head));
    v128_t       scales[N_ROWS], mins[N_ROWS], lanes[N_PANELS];
    for (int r = 0; r < N_ROWS; r++) {
        unpack_scales(x[r] + offsetof(block_q4_K, scales), &scales[r], &mins[r]);
    }
    lanes_to_f32(scales, lanes);
    for (int j = 0; j < N_PANELS; j++) {
        panels[j].scale[group] = wasm_f32x4_mul(d, lanes[j]);
    }
    lanes_to_f32(mins, lanes);
    for (int j = 0; j < N_PANELS; j++) {
        panels[j].min[group] = wasm_f32x4_mul(dmin, lanes[j]);
    }
}

// Bytes 32 j + 16 half + 0..15, whose low nibbles are weights 64 j + 16 half + 0..15 and whose high ones follow 32 further on.
ALWAYS_INLINE v128_t nibbles_of(const uint8_t * x, size_t qs, int j, int half) {
    return wasm_v128_load(x + qs + 32 * j + 16 * half);
}

ALWAYS_INLINE void pack_q4_K(const uint8_t * const x[N_ROWS], weight_panel * panels, int group) {
    set_scales_and_mins(x, panels, group);
    for (int i = 0; i < N_PANELS; i++) {
        const int j = i / 2, half = i % 2;
        v128_t    bytes[N_ROWS];
        for (int r = 0; r < N_ROWS; r++) {
            bytes[r] = nibbles_of(x[r], offsetof(block_q4_K, qs), j, half);
        }
        interleave_nibbles(bytes, panels[2 * j].codes + 4 * half, panels[2 * j + 1].codes + 4 * half, group);
    }
}

ALWAYS_INLINE void pack_q5_K(const uint8_t * const x[N_ROWS], weight_panel * panels, int group) {
    set_scales_and_mins(x, panels, group);
    for (int i = 0; i < N_PANELS; i++) {
        const int j = i / 2, half = i % 2;
        v128_t    low[N_ROWS], high[N_ROWS];
        for (int r = 0; r < N_ROWS; r++) {
            const v128_t bytes = nibbles_of(x[r], offsetof(block_q5_K, qs), j, half);
            const v128_t bits  = wasm_v128_load(x[r] + offsetof(block_q5_K, qh) + 16 * half);
            low[r]             = wasm_v128_or(low_nibbles(bytes), fifth_bit(bits, 2 * j));
            high[r]            = wasm_v128_or(high_nibbles(bytes), fifth_bit(bits, 2 * j + 1));
        }
        interleave(low, panels[2 * j].codes + 4 * half, group);
        interleave(high, panels[2 * j + 1].codes + 4 * half, group);
    }
}

// The signed codes of weights 128 h + 32 k + 16 g + 0..15, k = 0..3, times their scales: 16 bits hold them.
ALWAYS_INLINE void q6_K_words(const uint8_t * x, int h, int g, v128_t low[4], v128_t high[4]) {
    v128_t codes[4];
    q6_K_codes(x, h, g, codes);
    const int8_t * scales = (const int8_t *) x + offsetof(block_q6_K, scales) + 8 * h + g;
    for (int k = 0; k < 4; k++) {
        const v128_t q = wasm_i8x16_sub(codes[k], wasm_i8x16_splat(32)), scale = wasm_i16x8_splat(scales[2 * k]);
        low[k]         = wasm_i16x8_mul(wasm_i16x8_extend_low_i8x16(q), scale);
        high[k]        = wasm_i16x8_mul(wasm_i16x8_extend_high_i8x16(q), scale);
    }
}

ALWAYS_INLINE void pack_q6_K(const uint8_t * const x[N_ROWS], weight_panel * panels, int group) {
    const v128_t d = f16_high_to_f32(load_each(x, offsetof(block_q6_K, d) - 2));
    for (int i = 0; i < 4; i++) {
        const int h = i / 2, g = i % 2;
        v128_t    low[N_ROWS][4], high[N_ROWS][4];
        for (int r = 0; r < N_ROWS; r++) {
            q6_K_words(x[r], h, g, low[r], high[r]);
        }
        for (int k = 0; k < 4; k++) {
            weight_panel * panel = &panels[4 * h + k];
            const v128_t   lows[N_ROWS] = {low[0][k], low[1][k], low[2][k], low[3][k]};
            const v128_t   highs[N_ROWS] = {high[0][k], high[1][k], high[2][k], high[3][k]};
            interleave(lows, panel->codes + 8 * g, group);
            interleave(highs, panel->codes + 8 * g + 4, group);
            panel->scale[group] = d;
        }
    }
}

TILE_FORMAT(pw_tile_q4_K, block_q4_K, N_PANELS, pack_q4_K, pw_tiles_nibbles_min, 0)
TILE_FORMAT(pw_tile_q5_K, block_q5_K, N_PANELS, pack_q5_K, pw_tiles_bytes_min, 0)
TILE_FORMAT(pw_tile_q6_K, block_q6_K, N_PANELS, pack_q6_K, pw_tiles_words, 0)
