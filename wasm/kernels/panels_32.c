// Panels (tiles.h) of weights in blocks of 32: q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl. Layouts: rows_32.c.
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-quants.h"
#include "codes.h"
#include "panels.h"

ALWAYS_INLINE void set_scales(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    panel->scale[group] = f16_low_to_f32(load_each(x, 0));
}

ALWAYS_INLINE void set_scales_and_mins(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    const v128_t head = load_each(x, 0);
    panel->scale[group] = f16_low_to_f32(head);
    panel->min[group]   = f16_high_to_f32(head);
}

ALWAYS_INLINE void set_nibbles(const uint8_t * const x[N_ROWS], size_t offset, weight_panel * panel, int group) {
    v128_t bytes[N_ROWS];
    for (int r = 0; r < N_ROWS; r++) {
        bytes[r] = wasm_v128_load(x[r] + offset);
    }
    interleave_nibbles(bytes, panel->codes, panel->codes + 4, group);
}

ALWAYS_INLINE void pack_q4_0(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    set_scales(x, panel, group);
    set_nibbles(x, offsetof(block_q4_0, qs), panel, group);
}

ALWAYS_INLINE void pack_q4_1(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    set_scales_and_mins(x, panel, group);
    set_nibbles(x, offsetof(block_q4_1, qs), panel, group);
}

ALWAYS_INLINE void set_five_bits(const uint8_t * const x[N_ROWS], size_t qs, size_t qh, weight_panel * panel, int group) {
    v128_t low[N_ROWS], high[N_ROWS];
    for (int r = 0; r < N_ROWS; r++) {
        const v128_t bytes = wasm_v128_load(x[r] + qs), bits = wasm_v128_load32_zero(x[r] + qh);
        low[r]             = wasm_v128_or(low_nibbles(bytes), fifth_bits(bits, 0));
        high[r]            = wasm_v128_or(high_nibbles(bytes), fifth_bits(bits, 16));
    }
    interleave(low, panel->codes, group);
    interleave(high, panel->codes + 4, group);
}

ALWAYS_INLINE void pack_q5_0(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    set_scales(x, panel, group);
    set_five_bits(x, offsetof(block_q5_0, qs), offsetof(block_q5_0, qh), panel, group);
}

ALWAYS_INLINE void pack_q5_1(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    set_scales_and_mins(x, panel, group);
    set_five_bits(x, offsetof(block_q5_1, qs), offsetof(block_q5_1, qh), panel, group);
}

// Sixteen signed bytes of each row become codes of 16 bits. Products with one and zero in turn widen every other byte: done by
// another part of the processor than the shuffles, of which sign extension would take as many again.
ALWAYS_INLINE void set_words(const v128_t bytes[N_ROWS], v128_t codes[8][N_GROUPS], int group) {
    v128_t turned[4];
    turn(bytes, turned);
    for (int i = 0; i < 4; i++) {
        const v128_t pairs = wasm_i8x16_shuffle(turned[i], turned[i], 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
        codes[2 * i][group]     = dot_codes(pairs, wasm_i16x8_splat(0x0001));
        codes[2 * i + 1][group] = dot_codes(pairs, wasm_i16x8_splat(0x0100));
    }
}

ALWAYS_INLINE void pack_q8_0(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    set_scales(x, panel, group);
    for (int half = 0; half < 2; half++) {
        v128_t bytes[N_ROWS];
        for (int r = 0; r < N_ROWS; r++) {
            bytes[r] = wasm_v128_load(x[r] + offsetof(block_q8_0, qs) + 16 * half);
        }
        set_words(bytes, panel->codes + 8 * half, group);
    }
}

ALWAYS_INLINE void pack_iq4_nl(const uint8_t * const x[N_ROWS], weight_panel * panel, int group) {
    const v128_t table = wasm_v128_load(kvalues_iq4nl);
    v128_t       low[N_ROWS], high[N_ROWS];
    set_scales(x, panel, group);
    for (int r = 0; r < N_ROWS; r++) {
        const v128_t bytes = wasm_v128_load(x[r] + offsetof(block_iq4_nl, qs));
        low[r]             = wasm_i8x16_relaxed_swizzle(table, low_nibbles(bytes));
        high[r]            = wasm_i8x16_relaxed_swizzle(table, high_nibbles(bytes));
    }
    set_words(low, panel->codes, group);
    set_words(high, panel->codes + 8, group);
}

TILE_FORMAT(pw_tile_q4_0, block_q4_0, 1, pack_q4_0, pw_tiles_nibbles, 8)
TILE_FORMAT(pw_tile_q4_1, block_q4_1, 1, pack_q4_1, pw_tiles_nibbles_min, 0)
TILE_FORMAT(pw_tile_q5_0, block_q5_0, 1, pack_q5_0, pw_tiles_nibbles, 16)
TILE_FORMAT(pw_tile_q5_1, block_q5_1, 1, pack_q5_1, pw_tiles_bytes_min, 0)
TILE_FORMAT(pw_tile_q8_0, block_q8_0, 1, pack_q8_0, pw_tiles_words, 0)
TILE_FORMAT(pw_tile_iq4_nl, block_iq4_nl, 1, pack_iq4_nl, pw_tiles_words, 0)
