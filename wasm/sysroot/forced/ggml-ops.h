// Force-included into ops.cpp: vec.h defines the forms of GELU for floats inline; those of kernels/gelu.c take their place.
#pragma once
#include "vec.h"

extern "C" {
void pw_vec_gelu_f32(int n, float * y, const float * x);
void pw_vec_gelu_erf_f32(int n, float * y, const float * x);
void pw_vec_gelu_quick_f32(int n, float * y, const float * x);
void pw_vec_geglu_f32(int n, float * y, const float * x, const float * g);
void pw_vec_geglu_erf_f32(int n, float * y, const float * x, const float * g);
void pw_vec_geglu_quick_f32(int n, float * y, const float * x, const float * g);
}

#define ggml_vec_gelu_f32 pw_vec_gelu_f32
#define ggml_vec_gelu_erf_f32 pw_vec_gelu_erf_f32
#define ggml_vec_gelu_quick_f32 pw_vec_gelu_quick_f32
#define ggml_vec_geglu_f32 pw_vec_geglu_f32
#define ggml_vec_geglu_erf_f32 pw_vec_geglu_erf_f32
#define ggml_vec_geglu_quick_f32 pw_vec_geglu_quick_f32
