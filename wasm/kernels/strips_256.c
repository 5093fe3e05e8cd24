// Strips of super-blocks of 256 weights with mins. A record holds one block of each of eight rows; layouts of the blocks:
// rows_256.c, of q6_K's strips: strips_q6_K.c.
//
//   q4_K  half d[8]; half dmin[8];  for j = 0..3: uint8 scales[8][2], mins[8][2] of groups 2 j and 2 j + 1; cells of qs: the eight
//                                   words from byte 32 j on
//   q5_K  half d[8]; half dmin[8];  for j = 0..3: scales and mins as above; for rows 0..3, then for rows 4..7: the eight words of
//                                   group 2 j, then those of group 2 j + 1, in 80 bytes each (tight_codes.h)
//
// A column's block: scale; sums of activations in pairs, as the mins are; codes.
#include "strips_256.h"
#include "tight_codes.h"

typedef struct {
    v128_t scale;
    v128_t sums[N_64];
    v128_t codes[QK_K / sizeof(v128_t)];
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

static void weave_head_K(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, 0, is_weaving);
    weave_halves(record + 16, rows, 2, is_weaving);
}

static void weave_q4_K(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_head_K(record, rows, is_weaving);
    record += HEAD_K;
    for (int j = 0; j < N_64; j++) {
        weave_scales(record, rows, j, is_weaving);
        weave_words(record + 2 * SCALES, rows, offsetof(block_q4_K, qs) + 32 * (size_t) j, N_WORDS, is_weaving);
        record += 2 * SCALES + N_WORDS * CELLS;
    }
}

// The codes of group j, a byte each, and back.
static void read_codes(const block_q5_K * x, int j, uint8_t codes[PANEL_WEIGHTS]) {
    const uint8_t * qs = x->qs + PANEL_WEIGHTS * (j / 2);
    for (int i = 0; i < PANEL_WEIGHTS; i++) {
        codes[i] = (uint8_t) ((j % 2 ? qs[i] >> 4 : qs[i] & 15) | (x->qh[i] >> j & 1) << 4);
    }
}

static void write_codes(const uint8_t codes[PANEL_WEIGHTS], block_q5_K * x, int j) {
    uint8_t * qs = x->qs + PANEL_WEIGHTS * (j / 2);
    for (int i = 0; i < PANEL_WEIGHTS; i++) {
        qs[i]    = (uint8_t) (j % 2 ? (qs[i] & 15) | codes[i] << 4 : (qs[i] & 0xf0) | (codes[i] & 15));
        x->qh[i] = (uint8_t) ((x->qh[i] & ~(1 << j)) | codes[i] >> 4 << j);
    }
}

static void weave_group(uint8_t * words, block_q5_K * row, int j, bool is_weaving) {
    uint8_t codes[PANEL_WEIGHTS];
    if (is_weaving) {
        read_codes(row, j, codes);
    }
    weave_five_bits(words, codes, is_weaving);
    if (!is_weaving) {
        write_codes(codes, row, j);
    }
}

static void weave_q5_K(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_head_K(record, rows, is_weaving);
    record += HEAD_K;
    for (int j = 0; j < N_64; j++, record += 2 * SCALES + N_GROUPS * 2 * GROUP_5) {
        weave_scales(record, rows, j, is_weaving);
        for (int r = 0; r < STRIP_ROWS; r++) {
            uint8_t * words = record + 2 * SCALES + r / N_ROWS * 2 * GROUP_5 + r % N_ROWS * WORD;
            weave_group(words, (block_q5_K *) rows[r], 2 * j, is_weaving);
            weave_group(words + GROUP_5, (block_q5_K *) rows[r], 2 * j + 1, is_weaving);
        }
    }
}

// --- columns -----------------------------------------------------------------------------------------------------------------

ALWAYS_INLINE v128_t repeated_pair(int16_t a, int16_t b) {
    return wasm_i32x4_splat((uint16_t) a | (int32_t) ((uint32_t) (uint16_t) b << 16));
}

static void set_column(const uint8_t * y, v128_t * out) {
    const block_q8_K * block  = (const block_q8_K *) y;
    column_256 *       column = (column_256 *) out;
    const int16_t *    sums   = block->bsums;
    column->scale = wasm_f32x4_splat(block->d);
    for (int j = 0; j < N_64; j++, sums += 4) {
        column->sums[j] = repeated_pair((int16_t) (sums[0] + sums[1]), (int16_t) (sums[2] + sums[3]));
    }
    memcpy(column->codes, block->qs, sizeof(column->codes));
}

// --- products with one column ------------------------------------------------------------------------------------------------

ALWAYS_INLINE v128_t add_pairs(v128_t total, v128_t sums, v128_t factors) {
    return wasm_i32x4_add(total, wasm_i32x4_dot_i16x8(sums, factors));
}

typedef struct {
    v128_t products[N_GROUPS], mins[N_GROUPS];
} totals_256;

ALWAYS_INLINE void add_mins(const uint8_t * mins, v128_t sums_of_y, totals_256 * t) {
    for (int g = 0; g < N_GROUPS; g++) {
        t->mins[g] = add_pairs(t->mins[g], sums_of_y, wasm_u16x8_load8x8(mins + 8 * g));
    }
}

// else the runtime's compiler would put all of this off until the block's end, and keep the sums in memory
ALWAYS_INLINE void calculate(totals_256 * t, const void * pointer) {
    for (int g = 0; g < N_GROUPS; g++) {
        t->products[g] = calculated(t->products[g], pointer);
        t->mins[g]     = calculated(t->mins[g], pointer);
    }
}

// acc += the totals of a block, which begins at `head`, times its scales.
ALWAYS_INLINE void scale_totals(const uint8_t * head, const column_256 * column, const totals_256 * t, v128_t acc[N_GROUPS]) {
    v128_t d[N_GROUPS], dmin[N_GROUPS];
    load_halves(head, d);
    load_halves(head + 16, dmin);
    for (int g = 0; g < N_GROUPS; g++) {
        acc[g] = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(t->products[g]), wasm_f32x4_mul(d[g], column->scale), acc[g]);
        acc[g] = wasm_f32x4_relaxed_nmadd(wasm_f32x4_convert_i32x4(t->mins[g]), wasm_f32x4_mul(dmin[g], column->scale), acc[g]);
    }
}

// Sums of four cells: those of low and high halves.
ALWAYS_INLINE void add_cells(const uint8_t * x, v128_t low, v128_t high, v128_t sums[N_GROUPS][2]) {
    const v128_t q[4][2] = {{SPLAT32(low, 0), SPLAT32(high, 0)}, {SPLAT32(low, 1), SPLAT32(high, 1)},
                            {SPLAT32(low, 2), SPLAT32(high, 2)}, {SPLAT32(low, 3), SPLAT32(high, 3)}};
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) {
#pragma clang loop unroll(full)
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t w = wasm_v128_load(x + CELLS * i + 16 * g);
            sums[g][0] = wasm_i16x8_add(sums[g][0], dot_codes(q[i][0], low_nibbles(w)));
            sums[g][1] = wasm_i16x8_add(sums[g][1], dot_codes(q[i][1], high_nibbles(w)));
        }
        if (i == 1) {  // else registers would not do for the loads of all four (rows.h)
            sums[0][0] = calculated(sums[0][0], x);
            sums[0][1] = calculated(sums[0][1], x);
            sums[1][0] = calculated(sums[1][0], x);
            sums[1][1] = calculated(sums[1][1], x);
        }
    }
}

// Groups 2 j and 2 j + 1 of q4_K.
ALWAYS_INLINE const uint8_t * add_64(const uint8_t * x, const v128_t * q, v128_t sums_of_y, totals_256 * t) {
    const uint8_t * cells = x + 2 * SCALES;
    v128_t          sums[N_GROUPS][2] = {0};
#pragma clang loop unroll(disable)
    for (int half = 0; half < 2; half++, q++) {
        OPAQUE(q);
        OPAQUE(cells);
        add_cells(cells, q[0], q[2], sums);
        cells += 4 * CELLS;
    }
    for (int g = 0; g < N_GROUPS; g++) {
        const v128_t s = wasm_u16x8_load8x8(x + 8 * g);
        t->products[g] = add_pairs(t->products[g], sums[g][0], FIRST_OF_PAIRS(s));
        t->products[g] = add_pairs(t->products[g], sums[g][1], SECOND_OF_PAIRS(s));
    }
    add_mins(x + SCALES, sums_of_y, t);
    calculate(t, cells);
    return cells;
}

static void multiply_q4_K(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS]) {
    for (int64_t b = 0; b < n; b++) {
        const column_256 * column = (const column_256 *) y;
        const uint8_t *    head   = x;
        const v128_t *     q      = column->codes;
        totals_256         t      = {0};
        x += HEAD_K;
        x = add_64(x, q, column->sums[0], &t);
        x = add_64(x, q + 4, column->sums[1], &t);
        x = add_64(x, q + 8, column->sums[2], &t);
        x = add_64(x, q + 12, column->sums[3], &t);
        scale_totals(head, column, &t, acc);
        y = (const v128_t *) (column + 1);
    }
}

// 32 weights of four rows: 16 bits hold the sums of four words' products.
ALWAYS_INLINE v128_t add_group(const uint8_t * words, const v128_t q[2], v128_t scales, v128_t total) {
    v128_t codes[N_WORDS];
    codes_of_five(words, codes);
    for (int half = 0; half < 2; half++) {
        v128_t sum = dot_codes(SPLAT32(q[half], 0), codes[4 * half]);
        sum   = wasm_i16x8_add(sum, dot_codes(SPLAT32(q[half], 1), codes[4 * half + 1]));
        sum   = wasm_i16x8_add(sum, dot_codes(SPLAT32(q[half], 2), codes[4 * half + 2]));
        sum   = wasm_i16x8_add(sum, dot_codes(SPLAT32(q[half], 3), codes[4 * half + 3]));
        total = calculated(add_pairs(total, sum, scales), words);
    }
    return total;
}

static void multiply_q5_K(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS]) {
    for (int64_t b = 0; b < n; b++) {
        const column_256 * column = (const column_256 *) y;
        const uint8_t *    head   = x;
        const v128_t *     q = column->codes, * sums_of_y = column->sums;
        totals_256         t = {0};
        x += HEAD_K;
#pragma clang loop unroll(disable)
        for (int j = 0; j < N_64; j++) {
            const uint8_t * words = x + 2 * SCALES;
            OPAQUE(q);
            OPAQUE(sums_of_y);
            add_mins(x + SCALES, *sums_of_y, &t);
#pragma clang loop unroll(full)
            for (int g = 0; g < N_GROUPS; g++, words += 2 * GROUP_5) {
                const v128_t s = wasm_u16x8_load8x8(x + 8 * g);
                t.products[g]  = add_group(words, q, FIRST_OF_PAIRS(s), t.products[g]);
                t.products[g]  = add_group(words + GROUP_5, q + 2, SECOND_OF_PAIRS(s), t.products[g]);
            }
            x = words;
            OPAQUE(x);
            q += 4;
            sums_of_y++;
        }
        scale_totals(head, column, &t, acc);
        y = (const v128_t *) (column + 1);
    }
}

const strip_format pw_strip_q4_K = {
    GGML_TYPE_Q4_K, GGML_TYPE_Q8_K, HEAD_K + N_64 * (2 * SCALES + N_WORDS * CELLS), COLUMN_VECTORS, weave_q4_K, set_column, multiply_q4_K,
    &pw_strip_tiles_q4_K, &pw_strip_panels_q4_K,
};
const strip_format pw_strip_q5_K = {
    GGML_TYPE_Q5_K, GGML_TYPE_Q8_K, HEAD_K + N_64 * (2 * SCALES + 2 * N_GROUPS * GROUP_5), COLUMN_VECTORS, weave_q5_K, set_column, multiply_q5_K,
    &pw_strip_tiles_q5_K, &pw_strip_panels_q5_K,
};
