// Force-included into ggml-cpu.c: kernels/halves.c takes the place of its conversions of rows. The file defines them and names
// them in its table of types, which is to have ours, so only what parameters follow gets another name.
#pragma once
#include <ggml-cpu.h>

void upstream_fp16_to_fp32(const ggml_fp16_t * x, float * y, int64_t n);
void upstream_bf16_to_fp32(const ggml_bf16_t * x, float * y, int64_t n);

#define ggml_cpu_fp16_to_fp32(...) upstream_fp16_to_fp32(__VA_ARGS__)
#define ggml_cpu_bf16_to_fp32(...) upstream_bf16_to_fp32(__VA_ARGS__)
#define ggml_cpu_fp32_to_fp16(...) upstream_fp32_to_fp16(__VA_ARGS__)
#define ggml_cpu_fp32_to_bf16(...) upstream_fp32_to_bf16(__VA_ARGS__)
