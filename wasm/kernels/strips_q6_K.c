// Strips of q6_K. A record holds one block of each of eight rows; layout of the blocks: rows_256.c.
//
//   half d[8];  for each 32 weights: int8 scales[8][2] of both groups of 16; for rows 0..3, then for rows 4..7: two cells, each of
//               four words in 48 bytes (tight_codes.h). A word has two codes of the one group and two of the other.
//
// So the two 16-bit lanes of a row hold products of one group each, which take their scales in one instruction. A column's block:
// scale, then for each 32 weights the codes in the order of the words, and the biases of the cells.
#include "strips_256.h"
#include "tight_codes.h"

#define GROUP 16  // weights that share a scale
#define PARTS 2   // cells of 32 weights of a row

typedef struct {
    v128_t codes[PARTS];
    v128_t biases;  // for each part 16 bits of both groups, to be added to the products of its cells
} part_q6_K;

typedef struct {
    v128_t    scale;
    part_q6_K parts[2 * N_64];
} column_q6_K;

// --- weaving -----------------------------------------------------------------------------------------------------------------

static void read_codes(const block_q6_K * x, uint8_t codes[QK_K]) {
    for (int h = 0; h < 2; h++, codes += 128) {
        for (int i = 0; i < 32; i++) {
            const uint8_t a = x->ql[64 * h + i], b = x->ql[64 * h + 32 + i], bits = x->qh[32 * h + i];
            codes[i]      = (uint8_t) ((a & 15) | (bits & 3) << 4);
            codes[i + 32] = (uint8_t) ((b & 15) | (bits >> 2 & 3) << 4);
            codes[i + 64] = (uint8_t) (a >> 4 | (bits >> 4 & 3) << 4);
            codes[i + 96] = (uint8_t) (b >> 4 | bits >> 6 << 4);
        }
    }
}

static void write_codes(const uint8_t codes[QK_K], block_q6_K * x) {
    for (int h = 0; h < 2; h++, codes += 128) {
        for (int i = 0; i < 32; i++) {
            const uint8_t a = codes[i], b = codes[i + 32], c = codes[i + 64], d = codes[i + 96];
            x->ql[64 * h + i]      = (uint8_t) ((a & 15) | c << 4);
            x->ql[64 * h + 32 + i] = (uint8_t) ((b & 15) | d << 4);
            x->qh[32 * h + i]      = (uint8_t) (a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6);
        }
    }
}

// One group's two codes of each of a cell's words.
static void weave_lane(uint8_t * cell, uint8_t * codes, bool is_weaving) {
    uint16_t loose[4], tight[3];
    if (is_weaving) {
        memcpy(loose, codes, sizeof(loose));
        tighten_six(loose, tight);
    }
    for (int i = 0; i < 3; i++) {
        move_bytes(cell + 16 * i, (uint8_t *) &tight[i], sizeof(tight[i]), is_weaving);
    }
    if (!is_weaving) {
        loosen_six(tight, loose);
        memcpy(codes, loose, sizeof(loose));
    }
}

static void weave_row(uint8_t * record, block_q6_K * row, int r, bool is_weaving) {
    uint8_t   codes[QK_K];
    uint8_t * scales = record + 16 + 2 * r;
    uint8_t * cells  = record + 16 + SCALES + r / N_ROWS * PARTS * CELL_6 + r % N_ROWS * WORD;
    if (is_weaving) {
        read_codes(row, codes);
    }
    for (int i = 0; i < 2 * N_64; i++) {
        move_bytes(scales, (uint8_t *) &row->scales[2 * i], 2, is_weaving);
        for (int part = 0; part < PARTS; part++) {
            for (int group = 0; group < 2; group++) {
                weave_lane(cells + CELL_6 * part + 2 * group, codes + 2 * GROUP * i + GROUP * group + 8 * part, is_weaving);
            }
        }
        scales += SCALES + N_GROUPS * PARTS * CELL_6;
        cells += SCALES + N_GROUPS * PARTS * CELL_6;
    }
    if (!is_weaving) {
        write_codes(codes, row);
    }
}

static void weave_q6_K(uint8_t * record, uint8_t * const rows[STRIP_ROWS], bool is_weaving) {
    weave_halves(record, rows, offsetof(block_q6_K, d), is_weaving);
    for (int r = 0; r < STRIP_ROWS; r++) {
        weave_row(record, (block_q6_K *) rows[r], r, is_weaving);
    }
}

// --- products with one column ------------------------------------------------------------------------------------------------

// The sums of both groups' activations, a pair in every 32 bits.
ALWAYS_INLINE v128_t sums_of(v128_t codes) {
    const v128_t pairs = wasm_i16x8_extadd_pairwise_i8x16(codes);
    const v128_t half  = wasm_i16x8_add(pairs, wasm_i32x4_shuffle(pairs, pairs, 2, 3, 0, 1));
    return wasm_i16x8_add(half, wasm_i32x4_shuffle(half, half, 1, 0, 3, 2));
}

static void set_column(const uint8_t * y, v128_t * out) {
    const block_q8_K * block  = (const block_q8_K *) y;
    column_q6_K *      column = (column_q6_K *) out;
    column->scale = wasm_f32x4_splat(block->d);
    for (int i = 0; i < 2 * N_64; i++) {
        const int8_t * q    = block->qs + 2 * GROUP * i;
        part_q6_K *    part = &column->parts[i];
        mix_groups(wasm_v128_load(q), wasm_v128_load(q + GROUP), part->codes);
        const v128_t sums = wasm_i32x4_shuffle(sums_of(part->codes[0]), sums_of(part->codes[1]), 0, 4, 0, 4);
        part->biases      = wasm_i16x8_mul(sums, wasm_i16x8_splat(-BIAS_6));
    }
}

// A cell of four rows. Less their bias, sums of its products fit 16 bits; on the way there they may overflow. Activations are 127
// at most: -128 comes only of a NaN, or with a scale of zero.
ALWAYS_INLINE v128_t sum_of_cell(const uint8_t * x, const v128_t q[4], v128_t sum) {
    v128_t codes[4];
    codes_of_six(x, codes);
    for (int k = 0; k < 4; k++) {
        sum = wasm_i16x8_add(sum, dot_codes(q[k], codes[k]));
    }
    return sum;
}

// 32 weights of eight rows.
ALWAYS_INLINE void add_32(const uint8_t * x, const part_q6_K * y, v128_t totals[N_GROUPS]) {
    const v128_t    scales[N_GROUPS] = {wasm_i16x8_load8x8(x), wasm_i16x8_load8x8(x + 8)};
    const uint8_t * cells            = x + SCALES;
#pragma clang loop unroll(full)
    for (int part = 0; part < PARTS; part++, cells += CELL_6) {
        const v128_t w = y->codes[part], q[4] = {SPLAT32(w, 0), SPLAT32(w, 1), SPLAT32(w, 2), SPLAT32(w, 3)};
        const v128_t bias = part ? SPLAT32(y->biases, 1) : SPLAT32(y->biases, 0);
#pragma clang loop unroll(full)
        for (int g = 0; g < N_GROUPS; g++) {
            const v128_t sum = sum_of_cell(cells + PARTS * CELL_6 * g, q, bias);
            totals[g]        = calculated(wasm_i32x4_add(totals[g], wasm_i32x4_dot_i16x8(sum, scales[g])), x);
        }
    }
}

static void multiply_q6_K(int64_t n, const uint8_t * x, const v128_t * y, v128_t acc[N_GROUPS]) {
    for (int64_t b = 0; b < n; b++) {
        const column_q6_K * column = (const column_q6_K *) y;
        const part_q6_K *   part   = column->parts;
        const uint8_t *     head   = x;
        v128_t              totals[N_GROUPS] = {0}, d[N_GROUPS];
        x += 16;
#pragma clang loop unroll(disable)
        for (int i = 0; i < 2 * N_64; i++) {
            OPAQUE(x);
            OPAQUE(part);
            add_32(x, part, totals);
            x += SCALES + N_GROUPS * PARTS * CELL_6;
            part++;
        }
        load_halves(head, d);
        for (int g = 0; g < N_GROUPS; g++) {
            acc[g] = wasm_f32x4_relaxed_madd(wasm_f32x4_convert_i32x4(totals[g]), wasm_f32x4_mul(d[g], column->scale), acc[g]);
        }
        y = (const v128_t *) (column + 1);
    }
}

const strip_format pw_strip_q6_K = {
    GGML_TYPE_Q6_K, GGML_TYPE_Q8_K, 16 + 2 * N_64 * (SCALES + N_GROUPS * PARTS * CELL_6), sizeof(column_q6_K) / sizeof(v128_t),
    weave_q6_K, set_column, multiply_q6_K,
    &pw_strip_tiles_q6_K, &pw_strip_panels_q6_K,
};
