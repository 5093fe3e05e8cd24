// Strips of super-blocks of 256 weights. A record holds one block of each of eight rows; layouts of the blocks: rows_256.c.
//
//   q4_K  half d[8]; half dmin[8];                            for j = 0..3: uint8 scales[8][2], mins[8][2] of groups 2 j and
//                                                              2 j + 1; cells of qs: the eight words from byte 32 j on
//   q5_K  half d[8]; half dmin[8]; cells of qh (eight words); the same as q4_K
//   q6_K  half d[8];  for h = 0..1, g = 0..1: int8 scales[2][8][2] of groups 8 h + g + (0, 2), and + (4, 6); for rows 0..3, then
//                     rows 4..7, for i = 0..3: word i of ql from byte 64 h + 16 g on, of ql from 32 further on, and of qh
//                     from 32 h + 16 g on
//
// A column's block: scale; sums of activations in pairs, as the scales are; codes in the order of the cells.
#include "strips_256.h"

typedef struct {
    v128_t scale;
    v128_t sums[2 * N_64];
    v128_t codes[QK_K / WORD];
} column_256;

#define COLUMN_VECTORS (sizeof(column_256) / sizeof(v128_t))

// --- weaving -----------------------------------------------------------------------------------------------------------------

// Scale and min of group j out of the 6-bit fields of twelve bytes, and back into them.
static void get_scale_min(const uint8_t * packed, int j, uint8_t * scale, uint8_t * min) {
    if (j < 4) {
        *scale = packed[j] & 63;
        *min   = packed[j + 4] & 63;
    } else {
        *scale = (uint8_t) ((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4);
        *min   = (uint8_t) ((packed[j + 4] >> 4) | (packed[j] >> 6) << 4);
    }
}

static void put_scale_min(uint8_t * packed, int j, uint8_t scale, uint8_t min) {
    if (j < 4) {
        packed[j]     = (uint8_t) ((packed[j] & 0xc0) | scale);
        packed[j + 4] = (uint8_t) ((packed[j + 4] & 0xc0) | min);
    } else {
        packed[j + 4] = (uint8_t) ((scale & 15) | min << 4);
        packed[j - 4] = (uint8_t) ((packed[j - 4] & 63) | (scale >> 4) << 6);
        packed[j]     = (uint8_t) ((packed[j] & 63) | (min >> 4) << 6);
    }
}

// The scales and mins of groups 2 j and 2 j + 1.
static void weave_scales(uint8_t * record, uint8_t * const rows[STRIP_ROWS], int j, bool is_weaving) {
    for (int r = 0; r < STRIP_ROWS; r++) {
        for (int odd = 0; odd < 2; odd++) {
            uint8_t * packed = rows[r] + offsetof(block_q4_K, scales), * scale = record + 2 * r + odd, * min = scale + SCALES;
            if (is_weaving) {
                get_scale_min(packed, 2 * j + odd, scale, min);
            } else {
                put_scale_min(packed, 2 * j + odd, *scale, *min);
            }
        }
    }
}

static void weave_with_mins(uint8_t * record, uint8_t * const rows[STRIP_ROWS], size_t qs, bool is_weaving) {
    for (int j = 0; j < N_64; j++) {
        weave_scales(record, rows, j, is_weaving);
        weave_words(record + 2 * SCALES, rows, qs + 32 * (size_t) j, N_WORDS, is_weaving);
        record += 2 * SCALES + N_WORDS * CELLS;
    }
}

static void weave_head_K(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, 0, is_weaving);
    weave_halves(record + 16, rows, 2, is_weaving);
}

static void weave_q4_K(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_head_K(record, rows, is_weaving);
    weave_with_mins(record + HEAD_K, rows, offsetof(block_q4_K, qs), is_weaving);
}

static void weave_q5_K(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_head_K(record, rows, is_weaving);
    weave_words(record + HEAD_K, rows, offsetof(block_q5_K, qh), N_WORDS, is_weaving);
    weave_with_mins(record + HEAD_K + FIFTH_CELLS, rows, offsetof(block_q5_K, qs), is_weaving);
}

// Four rows' word i of ql, of ql 32 bytes further on, and of qh.
static uint8_t * weave_quarter(uint8_t * record, uint8_t * const rows[N_ROWS], int h, int g, bool is_weaving) {
    const size_t ql = offsetof(block_q6_K, ql) + 64 * (size_t) h + 16 * (size_t) g;
    const size_t qh = offsetof(block_q6_K, qh) + 32 * (size_t) h + 16 * (size_t) g;
    for (size_t i = 0; i < 4; i++) {
        const size_t from[3] = {ql + WORD * i, ql + 32 + WORD * i, qh + WORD * i};
        for (int part = 0; part < 3; part++) {
            for (int r = 0; r < N_ROWS; r++, record += WORD) {
                move_bytes(record, rows[r] + from[part], WORD, is_weaving);
            }
        }
    }
    return record;
}

static void weave_q6_K(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, offsetof(block_q6_K, d), is_weaving);
    record += 16;
    for (int part = 0; part < 4; part++) {
        const int h = part / 2, g = part % 2;
        for (int k = 0; k < 4; k++) {
            for (int r = 0; r < STRIP_ROWS; r++) {
                move_bytes(record + k / 2 * SCALES + 2 * r + k % 2, rows[r] + offsetof(block_q6_K, scales) + 8 * h + 2 * k + g, 1,
                           is_weaving);
            }
        }
        record += 2 * SCALES;
        record = weave_quarter(record, rows, h, g, is_weaving);
        record = weave_quarter(record, rows + N_ROWS, h, g, is_weaving);
    }
}

// --- columns -----------------------------------------------------------------------------------------------------------------

ALWAYS_INLINE v128_t repeated_pair(int16_t a, int16_t b) {
    return wasm_i32x4_splat((uint16_t) a | (int32_t) ((uint32_t) (uint16_t) b << 16));
}

static void repeat_for_mins(const uint8_t * y, v128_t * out) {
    const block_q8_K * block  = (const block_q8_K *) y;
    column_256 *       column = (column_256 *) out;
    const int16_t *    sums   = block->bsums;
    column->scale = wasm_f32x4_splat(block->d);
    for (int j = 0; j < N_64; j++) {
        column->sums[j] = repeated_pair((int16_t) (sums[4 * j] + sums[4 * j + 1]), (int16_t) (sums[4 * j + 2] + sums[4 * j + 3]));
        repeat_words(block->qs + 64 * j, N_WORDS, column->codes + 2 * N_WORDS * j, 2);
        repeat_words(block->qs + 64 * j + 32, N_WORDS, column->codes + 2 * N_WORDS * j + 1, 2);
    }
}

static void repeat_for_q6_K(const uint8_t * y, v128_t * out) {
    const block_q8_K * block  = (const block_q8_K *) y;
    column_256 *       column = (column_256 *) out;
    v128_t *           codes  = column->codes;
    column->scale = wasm_f32x4_splat(block->d);
    for (int part = 0; part < 4; part++, codes += 16) {
        const int h = part / 2, g = part % 2;
        for (int k = 0; k < 4; k++) {
            repeat_words(block->qs + 128 * h + 32 * k + 16 * g, 4, codes + k, 4);
        }
        column->sums[2 * part]     = repeated_pair(block->bsums[8 * h + g], block->bsums[8 * h + 2 + g]);
        column->sums[2 * part + 1] = repeated_pair(block->bsums[8 * h + 4 + g], block->bsums[8 * h + 6 + g]);
    }
}

// --- products with one column ------------------------------------------------------------------------------------------------

ALWAYS_INLINE v128_t add_pairs(v128_t total, v128_t sums, v128_t factors) {
    return wasm_i32x4_add(total, wasm_i32x4_dot_i16x8(sums, factors));
}

// Sums of n cells: [group of rows][low, high halves]. One cell a turn.
ALWAYS_INLINE void add_cells(int n, const uint8_t ** cells, const uint8_t ** fifth, const v128_t ** column, v128_t sums[N_GROUPS][2],
                             bool has_fifth_bit, int j) {
    const uint8_t * x = *cells, * bits = *fifth;
    const v128_t *  q = *column;
    for (int g = 0; g < N_GROUPS; g++) {
        sums[g][0] = sums[g][1] = wasm_i16x8_splat(0);
    }
#pragma clang loop unroll(disable)
    for (int i = 0; i < n; i++) {
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t w = wasm_v128_load(x + 16 * g);
            v128_t       low = low_nibbles(w), high = high_nibbles(w);
            if (has_fifth_bit) {
                const v128_t b = wasm_v128_load(bits + 16 * g);
                low  = wasm_v128_or(low, FIFTH(b, 2 * j));
                high = wasm_v128_or(high, FIFTH(b, 2 * j + 1));
            }
            sums[g][0] = wasm_i16x8_add(sums[g][0], dot_codes(q[0], low));
            sums[g][1] = wasm_i16x8_add(sums[g][1], dot_codes(q[1], high));
        }
        x += CELLS;
        q += 2;
        OPAQUE(x);
        OPAQUE(q);
        if (has_fifth_bit) {
            bits += CELLS;
            OPAQUE(bits);
        }
    }
    *cells  = x;
    *fifth  = bits;
    *column = q;
}

typedef struct {
    v128_t products[N_GROUPS], mins[N_GROUPS];
} totals_256;

// Groups 2 j and 2 j + 1. Codes of five bits fill 16 bits after four cells.
ALWAYS_INLINE void add_64(const uint8_t ** x, const uint8_t * fifth, const v128_t ** q, v128_t sums_of_y, totals_256 * t,
                          bool has_fifth_bit, int j) {
    const uint8_t * scales = *x, * cells = *x + 2 * SCALES;
    for (int done = 0; done < N_WORDS; done += has_fifth_bit ? 4 : N_WORDS) {
        v128_t sums[N_GROUPS][2];
        add_cells(has_fifth_bit ? 4 : N_WORDS, &cells, &fifth, q, sums, has_fifth_bit, j);
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t s = wasm_u16x8_load8x8(scales + 8 * g);
            t->products[g] = add_pairs(t->products[g], sums[g][0], FIRST_OF_PAIRS(s));
            t->products[g] = add_pairs(t->products[g], sums[g][1], SECOND_OF_PAIRS(s));
        }
    }
    for (int g = 0; g < N_GROUPS; g++) {
        t->mins[g] = add_pairs(t->mins[g], sums_of_y, wasm_u16x8_load8x8(scales + SCALES + 8 * g));
        // else the runtime's compiler would put all of this off until the block's end, and keep the sums in memory
        t->products[g] = calculated(t->products[g], cells);
        t->mins[g]     = calculated(t->mins[g], cells);
    }
    *x = cells;
}

ALWAYS_INLINE void multiply_with_mins(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS], bool has_fifth_bit) {
    for (int64_t b = 0; b < n; b++) {
        const column_256 * column = (const column_256 *) y;
        const uint8_t *    head = x, * fifth = x + HEAD_K;
        const v128_t *     q = column->codes;
        totals_256         t = {0};
        x += HEAD_K + (has_fifth_bit ? FIFTH_CELLS : 0);
        add_64(&x, fifth, &q, column->sums[0], &t, has_fifth_bit, 0);
        add_64(&x, fifth, &q, column->sums[1], &t, has_fifth_bit, 1);
        add_64(&x, fifth, &q, column->sums[2], &t, has_fifth_bit, 2);
        add_64(&x, fifth, &q, column->sums[3], &t, has_fifth_bit, 3);
        v128_t d[N_GROUPS], dmin[N_GROUPS];
        load_halves(head, d);
        load_halves(head + 16, dmin);
        for (int g = 0; g < N_GROUPS; g++) {
            acc[g] = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(t.products[g]), wasm_f32x4_mul(d[g], column->scale), acc[g]);
            acc[g] = wasm_f32x4_relaxed_nmadd(wasm_f32x4_convert_i32x4(t.mins[g]), wasm_f32x4_mul(dmin[g], column->scale), acc[g]);
        }
        y = q;
    }
}

static void multiply_q4_K(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS]) {
    multiply_with_mins(n, x, y, acc, false);
}

static void multiply_q5_K(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS]) {
    multiply_with_mins(n, x, y, acc, true);
}

// A cell of a quarter: sums of four groups, which begin with the first one.
ALWAYS_INLINE void add_cell(const uint8_t * x, const v128_t * q, v128_t sums[4], bool is_first) {
    v128_t codes[4];
    codes_q6_K(wasm_v128_load(x), wasm_v128_load(x + 16), wasm_v128_load(x + 32), codes);
    for (int k = 0; k < 4; k++) {
        const v128_t products = dot_codes(q[k], codes[k]);
        sums[k] = is_first ? products : wasm_i16x8_add(sums[k], products);
    }
}

// Four rows of a quarter, whose scales are s: codes of six bits fill 16 bits after two cells.
ALWAYS_INLINE v128_t add_quarter(const uint8_t ** cells, const v128_t * column, const v128_t s[2], v128_t total) {
    const uint8_t * x = *cells;
    const v128_t *  q = column;
#pragma clang loop unroll(disable)
    for (int half = 0; half < 2; half++, x += 96, q += 8) {
        v128_t sums[4];
        OPAQUE(x);
        OPAQUE(q);
        do {
            add_cell(x, q, sums, true);
        } while (is_repeated(x));
        do {
            add_cell(x + 48, q + 4, sums, false);
        } while (is_repeated(x));
        total = add_pairs(total, sums[0], FIRST_OF_PAIRS(s[0]));
        total = add_pairs(total, sums[1], SECOND_OF_PAIRS(s[0]));
        total = add_pairs(total, sums[2], FIRST_OF_PAIRS(s[1]));
        total = add_pairs(total, sums[3], SECOND_OF_PAIRS(s[1]));
    }
    *cells = x;
    return total;
}

static void multiply_q6_K(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS]) {
    for (int64_t b = 0; b < n; b++, y += COLUMN_VECTORS) {
        const column_256 * column = (const column_256 *) y;
        const uint8_t *    head   = x;
        const v128_t *     q = column->codes, * sums = column->sums;
        totals_256         t = {0};
        x += 16;
#pragma clang loop unroll(disable)
        for (int part = 0; part < 4; part++, q += 16, sums += 2) {
            const uint8_t * scales = x;
            x += 2 * SCALES;
            OPAQUE(q);
            OPAQUE(sums);
            for (int g = 0; g < N_GROUPS; g++) {
                const v128_t s[2] = {wasm_i16x8_load8x8(scales + 8 * g), wasm_i16x8_load8x8(scales + SCALES + 8 * g)};
                t.mins[g]     = add_pairs(add_pairs(t.mins[g], sums[0], s[0]), sums[1], s[1]);
                t.products[g] = add_quarter(&x, q, s, t.products[g]);
            }
        }
        v128_t d[N_GROUPS];
        load_halves(head, d);
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t total = wasm_i32x4_sub(t.products[g], wasm_i32x4_shl(t.mins[g], 5));
            acc[g] = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(total), wasm_f32x4_mul(d[g], column->scale), acc[g]);
        }
    }
}

const strip_format pw_strip_q4_K = {
    GGML_TYPE_Q4_K, GGML_TYPE_Q8_K, 1184, COLUMN_VECTORS, weave_q4_K, repeat_for_mins, multiply_q4_K,
    &pw_strip_tiles_q4_K, &pw_strip_panels_q4_K,
};
const strip_format pw_strip_q5_K = {
    GGML_TYPE_Q5_K, GGML_TYPE_Q8_K, 1440, COLUMN_VECTORS, weave_q5_K, repeat_for_mins, multiply_q5_K,
    &pw_strip_tiles_q5_K, &pw_strip_panels_q5_K,
};
const strip_format pw_strip_q6_K = {
    GGML_TYPE_Q6_K, GGML_TYPE_Q8_K, 1680, COLUMN_VECTORS, weave_q6_K, repeat_for_q6_K, multiply_q6_K,
    &pw_strip_tiles_q6_K, &pw_strip_panels_q6_K,
};
