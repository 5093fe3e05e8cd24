// Codes of five and six bits without gaps. A byte has one code in its low bits and bits of others on top, xor what the shifted
// vectors that give these codes bring to their place from elsewhere: so nothing is masked before the last step, and unpacking
// takes half as many instructions as from the layouts of the files (rows_256.c).
//
//   six bits    bytes x0 to x2:  codes 0 to 2 are the low bits; 3 = (x0 >> 2 ^ x1 >> 4 ^ x2 >> 6) & 63
//   five bits   bytes x0 to x4:  codes 0, 1, 3, 4 and 5 are the low bits; 2 = (x0 >> 5 ^ x1 >> 3) & 31,
//                                6 = (x3 >> 5 ^ x4 >> 3) & 31, 7 = (x2 >> 5 ^ x1 >> 2 ^ x4 >> 1) & 31
//
// Shifts are those of 16-bit lanes, of two codes each. What comes over from the upper byte are bits of its code, known before
// anything is filled in on top.
#pragma once

#include "weave.h"

#define SIX_BITS 0x3f3f
#define FIVE_BITS 0x1f1f
#define GROUP_5 80  // bytes of 32 weights of four rows, of five bits each
#define CELL_6 48   // bytes of 16 weights of four rows, of six bits each

// --- a lane of each vector, for weaving --------------------------------------------------------------------------------------

ALWAYS_INLINE uint16_t fourth_of_six(const uint16_t x[3]) {
    return (uint16_t) ((x[0] >> 2 ^ x[1] >> 4 ^ x[2] >> 6) & SIX_BITS);
}

ALWAYS_INLINE void tighten_six(const uint16_t codes[4], uint16_t x[3]) {
    memcpy(x, codes, 3 * sizeof(*x));
    const int missing = codes[3] ^ fourth_of_six(x);
    x[0] |= (uint16_t) ((missing & 0x3030) << 2);
    x[1] |= (uint16_t) ((missing & 0x0c0c) << 4);
    x[2] |= (uint16_t) ((missing & 0x0303) << 6);
}

ALWAYS_INLINE void loosen_six(const uint16_t x[3], uint16_t codes[4]) {
    for (int i = 0; i < 3; i++) {
        codes[i] = x[i] & SIX_BITS;
    }
    codes[3] = fourth_of_six(x);
}

// Codes 2 and 6 of five bits, each of two bytes.
ALWAYS_INLINE uint16_t third_of_five(const uint16_t x[2]) {
    return (uint16_t) ((x[0] >> 5 ^ x[1] >> 3) & FIVE_BITS);
}

ALWAYS_INLINE uint16_t last_of_five(const uint16_t x[5]) {
    return (uint16_t) ((x[2] >> 5 ^ x[1] >> 2 ^ x[4] >> 1) & FIVE_BITS);
}

ALWAYS_INLINE void tighten_five(const uint16_t codes[8], uint16_t x[5]) {
    memcpy(x, codes, 2 * sizeof(*x));
    memcpy(x + 2, codes + 3, 3 * sizeof(*x));
    // bits 6 and 7 of x1 and x4 are those of codes 2 and 6, bit 5 that of code 7, which sees bit 6 of x1; x0 and x3 come last, as
    // codes 2 and 6 see bit 5
    x[1] |= (uint16_t) (((codes[2] ^ third_of_five(x)) & 0x1818) << 3);
    x[4] |= (uint16_t) (((codes[6] ^ third_of_five(x + 3)) & 0x1818) << 3);
    const int missing = codes[7] ^ last_of_five(x);
    x[4] |= (uint16_t) ((missing & 0x1010) << 1);
    x[1] |= (uint16_t) ((missing & 0x0808) << 2);
    x[2] |= (uint16_t) ((missing & 0x0707) << 5);
    x[0] |= (uint16_t) (((codes[2] ^ third_of_five(x)) & 0x0707) << 5);
    x[3] |= (uint16_t) (((codes[6] ^ third_of_five(x + 3)) & 0x0707) << 5);
}

ALWAYS_INLINE void loosen_five(const uint16_t x[5], uint16_t codes[8]) {
    static const int places[5] = {0, 1, 3, 4, 5};
    for (int i = 0; i < 5; i++) {
        codes[places[i]] = x[i] & FIVE_BITS;
    }
    codes[2] = third_of_five(x);
    codes[6] = third_of_five(x + 3);
    codes[7] = last_of_five(x);
}

// A row's 32 codes of five bits, a byte each, to one lane of five vectors, and back.
ALWAYS_INLINE void weave_five_bits(uint8_t * words, uint8_t codes[PANEL_WEIGHTS], bool is_weaving) {
    for (int half = 0; half < WORD; half += 2) {  // two codes of each word
        uint16_t loose[N_WORDS], tight[5];
        if (is_weaving) {
            for (int i = 0; i < N_WORDS; i++) {
                memcpy(&loose[i], codes + WORD * i + half, sizeof(loose[i]));
            }
            tighten_five(loose, tight);
        }
        for (int i = 0; i < 5; i++) {
            move_bytes(words + 16 * i + half, (uint8_t *) &tight[i], sizeof(tight[i]), is_weaving);
        }
        if (!is_weaving) {
            loosen_five(tight, loose);
            for (int i = 0; i < N_WORDS; i++) {
                memcpy(codes + WORD * i + half, &loose[i], sizeof(loose[i]));
            }
        }
    }
}

// --- vectors -----------------------------------------------------------------------------------------------------------------

ALWAYS_INLINE v128_t six_bits(v128_t bytes) {
    return wasm_v128_and(bytes, wasm_i16x8_splat(SIX_BITS));
}

ALWAYS_INLINE v128_t five_bits(v128_t bytes) {
    return wasm_v128_and(bytes, wasm_i16x8_splat(FIVE_BITS));
}

ALWAYS_INLINE v128_t shifted_xor(v128_t a, int by_a, v128_t b, int by_b) {
    return wasm_v128_xor(wasm_u16x8_shr(a, by_a), wasm_u16x8_shr(b, by_b));
}

// Three vectors at x.
ALWAYS_INLINE void codes_of_six(const uint8_t * x, v128_t codes[4]) {
    const v128_t a = wasm_v128_load(x), b = wasm_v128_load(x + 16), c = wasm_v128_load(x + 32);
    codes[0] = six_bits(a);
    codes[1] = six_bits(b);
    codes[2] = six_bits(c);
    codes[3] = six_bits(wasm_v128_xor(wasm_u16x8_shr(a, 2), shifted_xor(b, 4, c, 6)));
}

// Five vectors at x.
ALWAYS_INLINE void codes_of_five(const uint8_t * x, v128_t codes[8]) {
    const v128_t a = wasm_v128_load(x), b = wasm_v128_load(x + 16), c = wasm_v128_load(x + 32), d = wasm_v128_load(x + 48),
                 e = wasm_v128_load(x + 64);
    codes[0] = five_bits(a);
    codes[1] = five_bits(b);
    codes[2] = five_bits(shifted_xor(a, 5, b, 3));
    codes[3] = five_bits(c);
    codes[4] = five_bits(d);
    codes[5] = five_bits(e);
    codes[6] = five_bits(shifted_xor(d, 5, e, 3));
    codes[7] = five_bits(wasm_v128_xor(wasm_u16x8_shr(c, 5), shifted_xor(b, 2, e, 1)));
}

// The same, four rows of a panel.
ALWAYS_INLINE void set_five_bits(const uint8_t * x, v128_t codes[][N_GROUPS], int g) {
    v128_t words[N_WORDS];
    codes_of_five(x, words);
    for (int i = 0; i < N_WORDS; i++) {
        codes[i][g] = words[i];
    }
}
