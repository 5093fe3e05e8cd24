// Strips of blocks of 32 weights. A record holds one block of each of eight rows:
//
//   q4_0  half d[8];              cells of qs: bytes 4 i to 4 i + 3 of rows 0..3, of rows 4..7, i = 0..3
//   q4_1  half d[8]; half m[8];   cells of qs
//   q5_0  half d[8];              the eight words of codes of rows 0..3, of rows 4..7, in 80 bytes each (tight_codes.h)
//   q5_1  half d[8]; half m[8];   words of codes
//
// A column's block: codes, scale, sum.
#include "panels.h"
#include "tight_codes.h"

#define N_CELLS 4

typedef struct {
    v128_t codes[2];  // of the low and the high halves
    v128_t head;      // scale, sum: int32, what codes 8 or 16 too large add, to be added; or f32, to be multiplied with m
} column_32;

static void weave_q4_0(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, offsetof(block_q4_0, d), is_weaving);
    weave_words(record + 16, rows, offsetof(block_q4_0, qs), N_CELLS, is_weaving);
}

static void weave_q4_1(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, offsetof(block_q4_1, d), is_weaving);
    weave_halves(record + 16, rows, offsetof(block_q4_1, m), is_weaving);
    weave_words(record + 32, rows, offsetof(block_q4_1, qs), N_CELLS, is_weaving);
}

// A row's codes: nibbles at qs, the fifth bits at qh.
static void weave_codes(uint8_t * words, uint8_t * qs, uint8_t * qh, bool is_weaving) {
    uint8_t  codes[PANEL_WEIGHTS];
    uint32_t bits;
    memcpy(&bits, qh, sizeof(bits));
    for (int i = 0; is_weaving && i < PANEL_WEIGHTS; i++) {
        codes[i] = (uint8_t) ((i < 16 ? qs[i] & 15 : qs[i - 16] >> 4) | (bits >> i & 1) << 4);
    }
    weave_five_bits(words, codes, is_weaving);
    if (is_weaving) {
        return;
    }
    bits = 0;
    for (int i = 0; i < PANEL_WEIGHTS; i++) {
        bits |= (uint32_t) (codes[i] >> 4) << i;
    }
    for (int i = 0; i < 16; i++) {
        qs[i] = (uint8_t) ((codes[i] & 15) | codes[i + 16] << 4);
    }
    memcpy(qh, &bits, sizeof(bits));
}

static void weave_five(uint8_t * record, uint8_t * const rows[STRIP_ROWS], size_t qs, size_t qh, bool is_weaving) {
    for (int r = 0; r < STRIP_ROWS; r++) {
        weave_codes(record + r / N_ROWS * GROUP_5 + r % N_ROWS * WORD, rows[r] + qs, rows[r] + qh, is_weaving);
    }
}

static void weave_q5_0(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, offsetof(block_q5_0, d), is_weaving);
    weave_five(record + 16, rows, offsetof(block_q5_0, qs), offsetof(block_q5_0, qh), is_weaving);
}

static void weave_q5_1(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, offsetof(block_q5_1, d), is_weaving);
    weave_halves(record + 16, rows, offsetof(block_q5_1, m), is_weaving);
    weave_five(record + 32, rows, offsetof(block_q5_1, qs), offsetof(block_q5_1, qh), is_weaving);
}

ALWAYS_INLINE void set_with_bias(const uint8_t * y, v128_t * out, int bias) {
    column_32 *  column = (column_32 *) out;
    const v128_t a = wasm_v128_load(y + offsetof(block_q8_0, qs)), b = wasm_v128_load(y + offsetof(block_q8_0, qs) + 16);
    const v128_t sums = wasm_i32x4_extadd_pairwise_i16x8(
        wasm_i16x8_add(wasm_i16x8_extadd_pairwise_i8x16(a), wasm_i16x8_extadd_pairwise_i8x16(b)));
    const v128_t sum = wasm_i32x4_mul(sum_each(sums, sums, sums, sums), wasm_i32x4_splat(-bias));
    column->head     = wasm_i32x4_shuffle(f16_low_to_f32(wasm_v128_load16_splat(y)), sum, 0, 4, 0, 4);
    column->codes[0] = a;
    column->codes[1] = b;
}

static void set_for_q4_0(const uint8_t * y, v128_t * out) {
    set_with_bias(y, out, 8);
}

static void set_for_q5_0(const uint8_t * y, v128_t * out) {
    set_with_bias(y, out, 16);
}

static void set_q8_1(const uint8_t * y, v128_t * out) {
    column_32 *  column = (column_32 *) out;
    const v128_t head   = wasm_v128_load32_splat(y);
    column->head = wasm_i32x4_shuffle(f16_low_to_f32(head), f16_high_to_f32(head), 0, 4, 0, 4);
    memcpy(column->codes, y + offsetof(block_q8_1, qs), sizeof(column->codes));
}

// The products of one record and one block of the column, of codes of four bits: 16 bits hold the sums of all 32.
ALWAYS_INLINE void add_nibbles(const uint8_t * qs, const v128_t y[2], v128_t totals[N_GROUPS]) {
    const v128_t q[N_CELLS][2] = {{SPLAT32(y[0], 0), SPLAT32(y[1], 0)}, {SPLAT32(y[0], 1), SPLAT32(y[1], 1)},
                                  {SPLAT32(y[0], 2), SPLAT32(y[1], 2)}, {SPLAT32(y[0], 3), SPLAT32(y[1], 3)}};
    v128_t sums[N_GROUPS] = {0};
#pragma clang loop unroll(full)
    for (int i = 0; i < N_CELLS; i++) {
#pragma clang loop unroll(full)
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t w = wasm_v128_load(qs + CELLS * i + 16 * g);
            const v128_t a = dot_codes(q[i][0], low_nibbles(w)), b = dot_codes(q[i][1], high_nibbles(w));
            sums[g] = calculated(wasm_i16x8_add(sums[g], wasm_i16x8_add(a, b)), qs);
        }
    }
    for (int g = 0; g < N_GROUPS; g++) {
        totals[g] = wasm_i32x4_extadd_pairwise_i16x8(sums[g]);
    }
}

// Of codes of five bits: 16 bits hold the sums of 16.
ALWAYS_INLINE void add_five_bits(const uint8_t * x, const v128_t y[2], v128_t totals[N_GROUPS]) {
    for (int g = 0; g < N_GROUPS; g++, x += GROUP_5) {
        v128_t codes[N_WORDS], sums[2];
        codes_of_five(x, codes);
        for (int half = 0; half < 2; half++) {
            sums[half] = dot_codes(SPLAT32(y[half], 0), codes[4 * half]);
            sums[half] = wasm_i16x8_add(sums[half], dot_codes(SPLAT32(y[half], 1), codes[4 * half + 1]));
            sums[half] = wasm_i16x8_add(sums[half], dot_codes(SPLAT32(y[half], 2), codes[4 * half + 2]));
            sums[half] = wasm_i16x8_add(sums[half], dot_codes(SPLAT32(y[half], 3), codes[4 * half + 3]));
            sums[half] = calculated(wasm_i32x4_extadd_pairwise_i16x8(sums[half]), x);
        }
        totals[g] = wasm_i32x4_add(sums[0], sums[1]);
    }
}

// What a record begins with, and all of it.
ALWAYS_INLINE size_t head_bytes(bool has_min) {
    return has_min ? 32 : 16;
}

ALWAYS_INLINE size_t record_bytes(bool has_min, bool has_five_bits) {
    return head_bytes(has_min) + (has_five_bits ? N_GROUPS * GROUP_5 : N_CELLS * CELLS);
}

ALWAYS_INLINE void multiply_32(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS], bool has_min,
                               bool has_five_bits) {
    v128_t sums[N_GROUPS] = {acc[0], acc[1]};
    for (int64_t b = 0; b < n; b++) {
        const column_32 * column = (const column_32 *) y;
        v128_t            totals[N_GROUPS], d[N_GROUPS], m[N_GROUPS];
        if (has_five_bits) {
            add_five_bits(x + head_bytes(has_min), column->codes, totals);
        } else {
            add_nibbles(x + head_bytes(has_min), column->codes, totals);
        }
        load_halves(x, d);
        if (has_min) {
            load_halves(x + 16, m);
        }
        const v128_t scale = SPLAT32(column->head, 0), sum = SPLAT32(column->head, 1);
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t total = has_min ? totals[g] : wasm_i32x4_add(totals[g], sum);
            sums[g] = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(total), wasm_f32x4_mul(d[g], scale), sums[g]);
            if (has_min) {
                sums[g] = wasm_f32x4_relaxed_madd(m[g], sum, sums[g]);
            }
        }
        x += record_bytes(has_min, has_five_bits);
        y = (const v128_t *) (column + 1);
        OPAQUE(x);
        OPAQUE(y);
    }
    acc[0] = sums[0];
    acc[1] = sums[1];
}

ALWAYS_INLINE void pack_32(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * panels, bool has_min, bool has_five_bits) {
    const uint8_t * x = rows[0];
    for (int64_t b = 0; b < n; b++, panels++, x += record_bytes(has_min, has_five_bits)) {
        const uint8_t * codes = x + head_bytes(has_min);
        OPAQUE(x);
        OPAQUE(panels);
        load_halves(x, panels->scale);
        if (has_min) {
            load_halves(x + 16, panels->min);
        }
        if (has_five_bits) {
            set_five_bits(codes, panels->codes, 0);
            set_five_bits(codes + GROUP_5, panels->codes, 1);
            continue;
        }
        for (int i = 0; i < N_CELLS * N_GROUPS; i++) {
            const v128_t w = wasm_v128_load(codes + 16 * i);
            panels->codes[i / N_GROUPS][i % N_GROUPS]           = low_nibbles(w);
            panels->codes[N_CELLS + i / N_GROUPS][i % N_GROUPS] = high_nibbles(w);
        }
    }
    rows[0] = x;
}

#define STRIP_32(type, TYPE, Y_TYPE, bytes, set_column, tile_set, bias, has_min, has_five_bits)                            \
    static void multiply_##type(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS]) {                    \
        multiply_32(n, x, y, acc, has_min, has_five_bits);                                                                 \
    }                                                                                                                      \
    static void pack_##type(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {                             \
        pack_32(n, x, panels, has_min, has_five_bits);                                                                     \
    }                                                                                                                      \
    static const tile_format TILES_##type = {pack_##type, &tile_set, bias, true};                                          \
    const strip_format       pw_strip_##type = {                                                                           \
        GGML_TYPE_##TYPE, GGML_TYPE_##Y_TYPE, bytes, sizeof(column_32) / sizeof(v128_t), weave_##type, set_column,         \
        multiply_##type, &TILES_##type, &TILES_##type,                                                                     \
    };

STRIP_32(q4_0, Q4_0, Q8_0, 144, set_for_q4_0, pw_tiles_nibbles, 8, false, false)
STRIP_32(q4_1, Q4_1, Q8_1, 160, set_q8_1, pw_tiles_nibbles_min, 0, true, false)
STRIP_32(q5_0, Q5_0, Q8_0, 176, set_for_q5_0, pw_tiles_nibbles, 16, false, true)
STRIP_32(q5_1, Q5_1, Q8_1, 192, set_q8_1, pw_tiles_bytes_min, 0, true, true)
