// Force-included into ggml's CPU files: upstream's SIMD macros, with half precision converted by arithmetic instead of table
// look-ups, one value at a time, and with fused multiply-add.
#pragma once
#include "simd-mappings.h"

#include "../../kernels/f16.h"

#undef GGML_F32x4_FMA
#define GGML_F32x4_FMA(a, b, c) wasm_f32x4_relaxed_madd(b, c, a)
#undef GGML_F16x4_LOAD
#define GGML_F16x4_LOAD(p) f16x4_load(p)
#undef GGML_F16x4_STORE
#define GGML_F16x4_STORE(p, v) f16x4_store(p, v)
