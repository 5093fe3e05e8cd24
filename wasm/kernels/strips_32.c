// Strips of blocks of 32 weights. A record holds one block of each of eight rows:
//
//   q4_0  half d[8];              cells of qs: bytes 4 i to 4 i + 3 of rows 0..3, of rows 4..7, i = 0..3
//   q4_1  half d[8]; half m[8];   cells of qs
//   q5_0  half d[8];              fifth bits of rows 0..3, of rows 4..7; cells of qs
//   q5_1  half d[8]; half m[8];   fifth bits; cells of qs
//
// The fifth bits of a row are four bytes: of byte c, bit 4 + i belongs to the low half of the cell's byte 4 i + c, bit 3 - i to
// its high half.
//
// A column's block: scale, sum, then codes 0..3, 16..19, 4..7, ... as the low and high halves of a cell want them.
#include "panels.h"
#include "weave.h"

#define N_CELLS 4

typedef struct {
    v128_t scale;
    v128_t sum;  // int32, what codes 8 or 16 too large add, to be added; or f32, to be multiplied with m
    v128_t codes[N_CELLS][2];
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

// The place of weight w's bit among a row's four bytes.
static void weave_fifth_bits(uint8_t * record, uint8_t * const rows[STRIP_ROWS], size_t qh, bool is_weaving) {
    for (int r = 0; r < STRIP_ROWS; r++) {
        uint32_t  bits;
        uint8_t * woven = record + WORD * r;
        memcpy(&bits, rows[r] + qh, sizeof(bits));
        memset(is_weaving ? woven : (uint8_t *) &bits, 0, sizeof(bits));
        for (int w = 0; w < 32; w++) {
            const int i = w % 16 / WORD, c = w % WORD, place = w < 16 ? 4 + i : 3 - i;
            if (is_weaving) {
                woven[c] |= (uint8_t) ((bits >> w & 1) << place);
            } else {
                bits |= (uint32_t) (woven[c] >> place & 1) << w;
            }
        }
        if (!is_weaving) {
            memcpy(rows[r] + qh, &bits, sizeof(bits));
        }
    }
}

static void weave_q5_0(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, offsetof(block_q5_0, d), is_weaving);
    weave_fifth_bits(record + 16, rows, offsetof(block_q5_0, qh), is_weaving);
    weave_words(record + 48, rows, offsetof(block_q5_0, qs), N_CELLS, is_weaving);
}

static void weave_q5_1(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, offsetof(block_q5_1, d), is_weaving);
    weave_halves(record + 16, rows, offsetof(block_q5_1, m), is_weaving);
    weave_fifth_bits(record + 32, rows, offsetof(block_q5_1, qh), is_weaving);
    weave_words(record + 64, rows, offsetof(block_q5_1, qs), N_CELLS, is_weaving);
}

ALWAYS_INLINE void repeat_codes(const int8_t * q, column_32 * column) {
    repeat_words(q, N_CELLS, &column->codes[0][0], 2);
    repeat_words(q + 16, N_CELLS, &column->codes[0][1], 2);
}

ALWAYS_INLINE void repeat_with_bias(const uint8_t * y, v128_t * out, int bias) {
    column_32 *  column = (column_32 *) out;
    const v128_t a = wasm_v128_load(y + offsetof(block_q8_0, qs)), b = wasm_v128_load(y + offsetof(block_q8_0, qs) + 16);
    const v128_t sums = wasm_i32x4_extadd_pairwise_i16x8(
        wasm_i16x8_add(wasm_i16x8_extadd_pairwise_i8x16(a), wasm_i16x8_extadd_pairwise_i8x16(b)));
    column->scale = f16_low_to_f32(wasm_v128_load16_splat(y));
    column->sum   = wasm_i32x4_mul(sum_each(sums, sums, sums, sums), wasm_i32x4_splat(-bias));
    repeat_codes((const int8_t *) y + offsetof(block_q8_0, qs), column);
}

static void repeat_for_q4_0(const uint8_t * y, v128_t * out) {
    repeat_with_bias(y, out, 8);
}

static void repeat_for_q5_0(const uint8_t * y, v128_t * out) {
    repeat_with_bias(y, out, 16);
}

static void repeat_q8_1(const uint8_t * y, v128_t * out) {
    column_32 *  column = (column_32 *) out;
    const v128_t head   = wasm_v128_load32_splat(y);
    column->scale = f16_low_to_f32(head);
    column->sum   = f16_high_to_f32(head);
    repeat_codes((const int8_t *) y + offsetof(block_q8_1, qs), column);
}

// What a record begins with.
ALWAYS_INLINE size_t head_bytes(bool has_min, bool has_fifth_bit) {
    return (has_min ? 32 : 16) + (has_fifth_bit ? 32 : 0);
}

// Four codes of each row: low or high halves of a cell, with fifth bits where they belong.
ALWAYS_INLINE v128_t with_fifth(v128_t codes, v128_t bits, bool has_fifth_bit) {
    return has_fifth_bit ? wasm_v128_or(codes, wasm_v128_and(bits, wasm_i8x16_splat(16))) : codes;
}

// The bits of the low halves move down from cell to cell, those of the high halves up; none comes from another byte in time.
typedef struct {
    v128_t low[N_GROUPS], high[N_GROUPS];
} fifth_bits_32;

ALWAYS_INLINE fifth_bits_32 load_fifth_bits(const uint8_t * x) {
    const v128_t a = wasm_v128_load(x), b = wasm_v128_load(x + 16);
    return (fifth_bits_32) {.low = {a, b}, .high = {wasm_i16x8_shl(a, 1), wasm_i16x8_shl(b, 1)}};
}

ALWAYS_INLINE void next_fifth_bits(fifth_bits_32 * bits) {
    for (int g = 0; g < N_GROUPS; g++) {
        bits->low[g]  = wasm_u16x8_shr(bits->low[g], 1);
        bits->high[g] = wasm_i16x8_shl(bits->high[g], 1);
    }
}

// The products of one record and one block of the column. A loop with one cell a turn, whose loads fit the registers (tiles.c
// says more). 16 bits hold the sums of 32 products with codes of four bits, and of 16 with codes of five.
ALWAYS_INLINE void add_cells(const uint8_t * qs, const v128_t * q, fifth_bits_32 bits, v128_t totals[N_GROUPS], bool has_fifth_bit) {
    v128_t low[N_GROUPS] = {0}, high[N_GROUPS] = {0};
#pragma clang loop unroll(disable)
    for (int i = 0; i < N_CELLS; i++) {
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t w = wasm_v128_load(qs + 16 * g);
            const v128_t a = dot_codes(q[0], with_fifth(low_nibbles(w), bits.low[g], has_fifth_bit));
            const v128_t b = dot_codes(q[1], with_fifth(high_nibbles(w), bits.high[g], has_fifth_bit));
            if (has_fifth_bit) {
                low[g]  = wasm_i16x8_add(low[g], a);
                high[g] = wasm_i16x8_add(high[g], b);
            } else {
                low[g] = wasm_i16x8_add(low[g], wasm_i16x8_add(a, b));
            }
        }
        if (has_fifth_bit) {
            next_fifth_bits(&bits);
        }
        qs += CELLS;
        q += 2;
        OPAQUE(qs);
        OPAQUE(q);
    }
    for (int g = 0; g < N_GROUPS; g++) {
        totals[g] = wasm_i32x4_extadd_pairwise_i16x8(low[g]);
        if (has_fifth_bit) {
            totals[g] = wasm_i32x4_add(totals[g], wasm_i32x4_extadd_pairwise_i16x8(high[g]));
        }
    }
}

ALWAYS_INLINE void multiply_32(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS], bool has_min, bool has_fifth_bit) {
    const size_t head = head_bytes(has_min, has_fifth_bit);
    v128_t       sums[N_GROUPS] = {acc[0], acc[1]};
    for (int64_t b = 0; b < n; b++) {
        const column_32 * column = (const column_32 *) y;
        fifth_bits_32     bits   = {0};
        v128_t            totals[N_GROUPS], d[N_GROUPS], m[N_GROUPS];
        if (has_fifth_bit) {
            bits = load_fifth_bits(x + head - 32);
        }
        add_cells(x + head, &column->codes[0][0], bits, totals, has_fifth_bit);
        load_halves(x, d);
        if (has_min) {
            load_halves(x + 16, m);
        }
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t total = has_min ? totals[g] : wasm_i32x4_add(totals[g], column->sum);
            sums[g] = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(total), wasm_f32x4_mul(d[g], column->scale), sums[g]);
            if (has_min) {
                sums[g] = wasm_f32x4_relaxed_madd(m[g], column->sum, sums[g]);
            }
        }
        x += head + N_CELLS * CELLS;
        y = (const v128_t *) (column + 1);
        OPAQUE(x);
        OPAQUE(y);
    }
    acc[0] = sums[0];
    acc[1] = sums[1];
}

ALWAYS_INLINE void pack_32(int64_t n, const uint8_t * rows[PANEL_ROWS], weight_panel * panels, bool has_min, bool has_fifth_bit) {
    const size_t    head = head_bytes(has_min, has_fifth_bit);
    const uint8_t * x    = rows[0];
    for (int64_t b = 0; b < n; b++, panels++, x += head + N_CELLS * CELLS) {
        fifth_bits_32 bits = {0};
        OPAQUE(x);
        OPAQUE(panels);
        load_halves(x, panels->scale);
        if (has_min) {
            load_halves(x + 16, panels->min);
        }
        if (has_fifth_bit) {
            bits = load_fifth_bits(x + head - 32);
        }
        for (int i = 0; i < N_CELLS; i++) {
            for (int g = 0; g < N_GROUPS; g++) {
                const v128_t w = wasm_v128_load(x + head + CELLS * (size_t) i + 16 * g);
                panels->codes[i][g]           = with_fifth(low_nibbles(w), bits.low[g], has_fifth_bit);
                panels->codes[N_CELLS + i][g] = with_fifth(high_nibbles(w), bits.high[g], has_fifth_bit);
            }
            next_fifth_bits(&bits);
        }
    }
    rows[0] = x;
}

#define STRIP_32(type, TYPE, Y_TYPE, bytes, repeat, tile_set, bias, has_min, has_fifth_bit)                                \
    static void multiply_##type(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS]) {                    \
        multiply_32(n, x, y, acc, has_min, has_fifth_bit);                                                                 \
    }                                                                                                                      \
    static void pack_##type(int64_t n, const uint8_t * x[PANEL_ROWS], weight_panel * panels) {                             \
        pack_32(n, x, panels, has_min, has_fifth_bit);                                                                     \
    }                                                                                                                      \
    static const tile_format TILES_##type = {pack_##type, &tile_set, bias, true};                                          \
    const strip_format       pw_strip_##type = {                                                                           \
        GGML_TYPE_##TYPE, GGML_TYPE_##Y_TYPE, bytes, sizeof(column_32) / sizeof(v128_t), weave_##type, repeat, multiply_##type, \
        &TILES_##type, &TILES_##type,                                                                                      \
    };

STRIP_32(q4_0, Q4_0, Q8_0, 144, repeat_for_q4_0, pw_tiles_nibbles, 8, false, false)
STRIP_32(q4_1, Q4_1, Q8_1, 160, repeat_q8_1, pw_tiles_nibbles_min, 0, true, false)
STRIP_32(q5_0, Q5_0, Q8_0, 176, repeat_for_q5_0, pw_tiles_nibbles, 16, false, true)
STRIP_32(q5_1, Q5_1, Q8_1, 192, repeat_q8_1, pw_tiles_bytes_min, 0, true, true)
