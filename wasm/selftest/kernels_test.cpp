// Our kernels against ggml's scalar references, from inside a guest. One line "ok NAME" per case.
#include "ggml-cpu.h"
#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

extern "C" {
void quantize_row_q8_0(const float * x, void * y, int64_t k);
void quantize_row_q8_1(const float * x, void * y, int64_t k);
}

// A block as both formats lay it out: the scale, for q8_1 the sum, 32 values.
static const int N = 32;

static int check_block(const float * x, const uint8_t * block, bool has_sum) {
    ggml_fp16_t half;
    memcpy(&half, block, 2);
    const int8_t * qs = (const int8_t *) block + (has_sum ? 4 : 2);
    float max = 0.0f;
    for (int i = 0; i < N; i++) {
        max = std::fmax(max, std::fabs(x[i]));
    }
    int n_bad = half != ggml_fp32_to_fp16(max / 127.0f);
    int sum   = 0;
    for (int i = 0; i < N; i++) {
        const int expected = max == 0.0f ? 0 : (int) std::nearbyint(x[i] * (127.0f / max));
        n_bad += qs[i] != expected;
        sum   += expected;
    }
    if (has_sum) {
        memcpy(&half, block + 2, 2);
        n_bad += half != ggml_fp32_to_fp16(max / 127.0f * (float) sum);
    }
    return n_bad;
}

static bool check(void (*quantize)(const float *, void *, int64_t), bool has_sum) {
    std::mt19937                          random(7);
    std::normal_distribution<float>       normal;
    std::uniform_real_distribution<float> exponent(-20.0f, 8.0f);
    const size_t         block_size = has_sum ? 36 : 34;
    std::vector<float>   x(N * 64);
    std::vector<uint8_t> y(block_size * 64);
    int n_bad = 0;
    for (int round = 0; round < 200; round++) {
        const float scale = std::exp2(exponent(random));
        for (float & value : x) {
            value = round == 0 ? 0.0f : round == 1 ? 0.5f * (float) ((int) (random() % 255) - 127) : scale * normal(random);
        }
        quantize(x.data(), y.data(), (int64_t) x.size());
        for (size_t i = 0; i < 64; i++) {
            n_bad += check_block(x.data() + N * i, y.data() + block_size * i, has_sum);
        }
    }
    return n_bad == 0;
}

int main() {
    ggml_cpu_init();
    const bool q8_0 = check(quantize_row_q8_0, false);
    const bool q8_1 = check(quantize_row_q8_1, true);
    printf("%s quantize_row_q8_0\n%s quantize_row_q8_1\n", q8_0 ? "ok" : "FAILED", q8_1 ? "ok" : "FAILED");
    return !(q8_0 && q8_1);
}
