// What is known of strips of blocks of 256 weights (strips_256.c, strips_q6_K.c) also where their panels are made
// (strips_256_panels.c).
#pragma once

#include "panels.h"
#include "weave.h"

#define N_64 4      // parts of 64 weights
#define SCALES 16   // bytes of eight rows' scales of two groups
#define HEAD_K 32   // d and dmin
#define BIAS_6 32   // that q6_K's codes are too large

// Each 16-bit lane of a pair in both places.
#define FIRST_OF_PAIRS(v) wasm_i16x8_shuffle(v, v, 0, 0, 2, 2, 4, 4, 6, 6)
#define SECOND_OF_PAIRS(v) wasm_i16x8_shuffle(v, v, 1, 1, 3, 3, 5, 5, 7, 7)

// For products, with integer scales, and for the expansion to f32.
extern const tile_format pw_strip_tiles_q4_K, pw_strip_tiles_q5_K, pw_strip_tiles_q6_K;
extern const tile_format pw_strip_panels_q4_K, pw_strip_panels_q5_K, pw_strip_panels_q6_K;
