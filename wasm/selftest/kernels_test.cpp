// Our kernels against ggml's scalar references, from inside a guest. One line "ok NAME" per case.
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "llamafile/sgemm.h"
#include "../kernels/blas.h"
#include "attention_test.h"
#include "float_tiles_test.h"
#include "products_test.h"
#include "small_ops_test.h"
#include "strips_test.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
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

// ggml has no reader of the two formats that are only activations: q8_1 {half d, s; int8 qs[32]}, q8_K {float d; int8 qs[256]; ..}.
static void read_row(ggml_type type, const uint8_t * row, float * out, int64_t n) {
    if (type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K) {
        ggml_get_type_traits(type)->to_float(row, out, n);
        return;
    }
    const int64_t size = ggml_blck_size(type);
    for (int64_t i = 0; i < n; i++) {
        const uint8_t * block = row + ggml_type_size(type) * (i / size);
        ggml_fp16_t     half;
        float           scale;
        memcpy(&half, block, sizeof(half));
        memcpy(&scale, block, sizeof(scale));
        out[i] = (type == GGML_TYPE_Q8_1 ? ggml_fp16_to_fp32(half) : scale) * (float) (int8_t) block[4 + i % size];
    }
}

// Every weight type of kernels/matmul.c against the sum of products of the values its blocks stand for, in double precision.
static bool check_matmul(ggml_type type, int n_threads, int64_t m, int64_t n, int64_t k) {
    const auto *               traits = ggml_get_type_traits_cpu(type);
    const ggml_type            y_type = traits->vec_dot_type;
    std::mt19937               random(type);
    std::normal_distribution<float> normal;
    std::vector<float>         w(k * m), y(k * n), w_read(k), y_read(k);
    for (float & value : w) { value = normal(random); }
    for (float & value : y) { value = 3.0f * normal(random); }
    const size_t         w_row = ggml_row_size(type, k), y_row = ggml_row_size(y_type, k);
    std::vector<uint8_t> w_q(w_row * m), y_q(y_row * n);
    ggml_quantize_chunk(type, w.data(), w_q.data(), 0, m, k, nullptr);
    for (int64_t j = 0; j < n; j++) {
        ggml_get_type_traits_cpu(y_type)->from_float(y.data() + j * k, y_q.data() + j * y_row, k);
    }
    std::vector<float> result(m * n, NAN);
    for (int ith = 0; ith < n_threads; ith++) {
        ggml_compute_params params = {};
        params.ith = ith;
        params.nth = n_threads;
        if (!llamafile_sgemm(&params, m, n, k / ggml_blck_size(type), w_q.data(), k / ggml_blck_size(type), y_q.data(),
                             k / ggml_blck_size(y_type), result.data(), m, type, y_type, GGML_TYPE_F32)) {
            return false;
        }
    }
    double worst = 0.0;
    for (int64_t j = 0; j < n; j++) {
        read_row(y_type, y_q.data() + j * y_row, y_read.data(), k);
        for (int64_t i = 0; i < m; i++) {
            read_row(type, w_q.data() + i * w_row, w_read.data(), k);
            double expected = 0.0, size = 0.0;
            for (int64_t l = 0; l < k; l++) {
                expected += (double) w_read[l] * y_read[l];
                size     += std::fabs((double) w_read[l] * y_read[l]);
            }
            const double error = std::fabs(result[j * m + i] - expected) / size;
            worst              = error <= worst ? worst : error;  // NaN counts
        }
    }
    // q8_1 keeps the sum of a block in half precision: one part in two thousand
    return worst < (y_type == GGML_TYPE_Q8_1 ? 2e-4 : 2e-6);
}

// Neither rows nor columns are multiples of four; more columns and longer ones than panels of activations hold at once.
static const struct { int64_t m, n, k; } MATMUL_SIZES[] = {
    {23, 1, 512}, {3, 3, 512}, {9, 4, 512}, {6, 5, 768}, {23, 6, 512}, {5, 71, 256}, {4, 64, 2560}, {2, 9, 256},
};

// Tiles add up in the order of the rows kernels where both scale blocks of 32: a batch then gives what its parts give alone.
static bool is_batch_same(ggml_type type) {
    const ggml_type      y_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
    const int64_t        k = 1024, m = 10, n = 7, n_blocks = k / 32;
    std::mt19937         random(type);
    std::normal_distribution<float> normal;
    std::vector<float>   w(k * m), y(k * n), together(m * n), alone(m * n);
    for (float & value : w) { value = normal(random); }
    for (float & value : y) { value = normal(random); }
    const size_t         w_row = ggml_row_size(type, k), y_row = ggml_row_size(y_type, k);
    std::vector<uint8_t> w_q(w_row * m), y_q(y_row * n);
    ggml_quantize_chunk(type, w.data(), w_q.data(), 0, m, k, nullptr);
    ggml_compute_params params = {};
    params.nth = 1;
    bool done = true;
    for (int64_t j = 0; j < n; j++) {
        uint8_t * column = y_q.data() + j * y_row;
        ggml_get_type_traits_cpu(y_type)->from_float(y.data() + j * k, column, k);
        done &= llamafile_sgemm(&params, m, 1, n_blocks, w_q.data(), n_blocks, column, n_blocks, alone.data() + j * m, m, type, y_type, GGML_TYPE_F32);
    }
    done &= llamafile_sgemm(&params, m, n, n_blocks, w_q.data(), n_blocks, y_q.data(), n_blocks, together.data(), m, type, y_type, GGML_TYPE_F32);
    return done && memcmp(together.data(), alone.data(), m * n * sizeof(float)) == 0;
}

// Products by the host's BLAS: the same as without it, but for the order of a sum, whatever the threads; rows lie apart.
static bool multiply_all(ggml_type type, ggml_type y_type, int n_threads, int64_t m, int64_t n, int64_t k, int64_t gap, const uint8_t * w,
                         const uint8_t * y, std::vector<float> & result) {
    for (int ith = 0; ith < n_threads; ith++) {
        ggml_compute_params params = {};
        params.ith = ith;
        params.nth = n_threads;
        if (!llamafile_sgemm(&params, m, n, k / ggml_blck_size(type), w, k / ggml_blck_size(type) + gap, y,
                             k / ggml_blck_size(y_type) + gap, result.data(), m + gap, type, y_type, GGML_TYPE_F32)) {
            return false;
        }
    }
    return true;
}

// Types that take many seconds to prepare their grids before they quantize.
static bool has_grid(ggml_type type) {
    for (ggml_type other : {GGML_TYPE_IQ1_S, GGML_TYPE_IQ1_M, GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ2_XS, GGML_TYPE_IQ2_S, GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ3_S}) {
        if (type == other) { return true; }
    }
    return false;
}

// Any bytes, with finite scales: a half at the front of a block, in iq1_m spread over its last eight bytes.
static void draw_row(ggml_type type, uint8_t * row, int64_t k, std::mt19937 & random) {
    const size_t size = ggml_type_size(type);
    for (size_t i = 0; i < ggml_row_size(type, k); i++) {
        row[i] = (uint8_t) random();
        if (type == GGML_TYPE_IQ1_M ? i % size == size - 1 : i % size == 1) { row[i] = 0x30 | (row[i] & 0x8f); }
    }
}

static bool check_blas(ggml_type type, int n_threads, int64_t m, int64_t n, int64_t k, int kind = BLAS_WHOLE) {
    const ggml_type      y_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
    const int64_t        gap    = 1;
    const size_t         w_row = ggml_row_size(type, k) + ggml_type_size(type), y_row = ggml_row_size(y_type, k) + ggml_type_size(y_type);
    std::mt19937         random(type);
    std::normal_distribution<float> normal;
    std::vector<float>   values(k), importance(k, 1.0f), w_read(k * m), y_read(k * n);
    std::vector<uint8_t> w(w_row * m, 0xff), y(y_row * n, 0xff);
    for (int64_t i = 0; i < m; i++) {
        for (float & value : values) { value = normal(random); }
        if (has_grid(type)) { draw_row(type, w.data() + i * w_row, k, random); }
        else { ggml_quantize_chunk(type, values.data(), w.data() + i * w_row, 0, 1, k, importance.data()); }
        if (type == GGML_TYPE_F32) { memcpy(w.data() + i * w_row, values.data(), k * sizeof(float)); }
        if (type == GGML_TYPE_F32) { memcpy(w_read.data() + i * k, values.data(), k * sizeof(float)); }
        else { read_row(type, w.data() + i * w_row, w_read.data() + i * k, k); }
    }
    for (int64_t j = 0; j < n; j++) {
        for (float & value : values) { value = 3.0f * normal(random); }
        if (y_type == GGML_TYPE_F32) {
            memcpy(y.data() + j * y_row, values.data(), k * sizeof(float));
            memcpy(y_read.data() + j * k, values.data(), k * sizeof(float));
        } else {
            ggml_get_type_traits_cpu(y_type)->from_float(values.data(), y.data() + j * y_row, k);
            read_row(y_type, y.data() + j * y_row, y_read.data() + j * k, k);
        }
    }
    std::vector<float> result(n * (m + gap), 7.0f);
    pw_set_blas(kind);
    const bool is_taken = multiply_all(type, y_type, n_threads, m, n, k, gap, w.data(), y.data(), result);
    pw_set_blas(0);
    double worst = 0.0;
    for (int64_t j = 0; j < n; j += j % 7 == 0 || j + 6 > n ? 1 : 6) {
        for (int64_t i = 0; i < m; i += 1 + i % 3) {
            double expected = 0.0, size = 0.0;
            for (int64_t l = 0; l < k; l++) {
                expected += (double) w_read[i * k + l] * y_read[j * k + l];
                size     += std::fabs((double) w_read[i * k + l] * y_read[j * k + l]);
            }
            const double error = std::fabs(result[j * (m + gap) + i] - expected) / size;
            worst              = error <= worst ? worst : error;
        }
        worst = result[j * (m + gap) + m] == 7.0f ? worst : NAN;
    }
    return is_taken && worst < 1e-6;
}

// To the last bit what ggml reads.
static bool check_expansion(ggml_type type) {
    const int64_t        k = 768;
    std::vector<uint8_t> blocks(ggml_row_size(type, k));
    std::vector<float>   values(k), importance(k, 1.0f), found(k + 1, 7.0f), expected(k);
    std::mt19937         random(type);
    for (int round = 0; round < 50; round++) {
        const float scale = std::exp2((float) (round % 20) - 12.0f);
        std::normal_distribution<float> normal(0.0f, scale);
        for (float & value : values) { value = normal(random); }
        ggml_quantize_chunk(type, values.data(), blocks.data(), 0, 1, k, importance.data());
        pw_expand_function(type)(blocks.data(), found.data(), k);
        ggml_get_type_traits(type)->to_float(blocks.data(), expected.data(), k);
        if (memcmp(found.data(), expected.data(), k * sizeof(float)) || found[k] != 7.0f) {
            return false;
        }
    }
    return true;
}

// A weight of -128 comes from no quantizer; as 127 it is wrong by one part in 128 and must not be wrong by a sign.
static bool check_smallest_weight() {
    const int            n = 32;
    std::vector<uint8_t> w(34 * 4), y(34);
    const ggml_fp16_t    one = ggml_fp32_to_fp16(1.0f);
    for (int row = 0; row < 4; row++) {
        memcpy(w.data() + 34 * row, &one, 2);
        memset(w.data() + 34 * row + 2, 0x80, n);
    }
    memcpy(y.data(), &one, 2);
    memset(y.data() + 2, 0xff, n);  // -1
    float               result[4];
    ggml_compute_params params = {};
    params.nth = 1;
    const bool done = llamafile_sgemm(&params, 4, 1, 1, w.data(), 1, y.data(), 1, result, 4, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, GGML_TYPE_F32);
    return done && result[0] == 127.0f * n && result[3] == 127.0f * n;
}

static int n_failed = 0;

static void report(bool is_ok, const std::string & name) {
    printf("%s %s\n", is_ok ? "ok" : "FAILED", name.c_str());
    n_failed += !is_ok;
}

int main() {
    ggml_cpu_init();
    report(check(quantize_row_q8_0, false), "quantize_row_q8_0");
    report(check(quantize_row_q8_1, true), "quantize_row_q8_1");
    for (ggml_type type : {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL,
                           GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K}) {
        for (int n_threads : {1, 3}) {
            for (const auto & size : MATMUL_SIZES) {
                report(check_matmul(type, n_threads, size.m, size.n, size.k),
                       std::string("matmul ") + ggml_type_name(type) + ", " + std::to_string(size.m) + " rows, " + std::to_string(size.n)
                           + " columns of " + std::to_string(size.k) + ", threads " + std::to_string(n_threads));
            }
        }
    }
    for (ggml_type type : {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL}) {
        report(is_batch_same(type), std::string("matmul ") + ggml_type_name(type) + ", together as alone");
    }
    for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,
                           GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K}) {
        report(check_expansion(type), std::string("expand ") + ggml_type_name(type));
    }
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {  // every type that weights can have, those without kernels of ours too
        const auto * traits = ggml_get_type_traits_cpu((ggml_type) type);
        if (!traits->vec_dot || type == GGML_TYPE_Q8_1 || type == GGML_TYPE_Q8_K) {
            continue;
        }
        for (int n_threads : {1, 3}) {
            report(check_blas((ggml_type) type, n_threads, 77, 512, 512),
                   std::string("blas ") + ggml_type_name((ggml_type) type) + ", threads " + std::to_string(n_threads));
        }
        report(check_blas((ggml_type) type, 1, 300, 512, 2304, BLAS_SLICES),  // several calls, of parts of unequal depth
               std::string("blas in slices, ") + ggml_type_name((ggml_type) type));
    }
    report(check_blas(GGML_TYPE_F16, 2, 700, 600, 256), "blas f16, more rows and columns than a call takes");
    report(check_blas(GGML_TYPE_Q8_0, 1, 40, 513, 4096), "blas q8_0, one column more than a call takes");
    report(check_blas(GGML_TYPE_F16, 2, 700, 600, 1792, BLAS_SLICES), "blas in slices, f16, more rows and columns than a call takes");
    report(check_blas(GGML_TYPE_F32, 1, 77, 19, 1796, BLAS_SLICES), "blas in slices, f32, read in place");
    report(check_blas(GGML_TYPE_F16, 2, 90, 29, 2049, BLAS_SLICES), "blas in slices, f16, parts of which the last is short");
    report(check_blas(GGML_TYPE_F32, 1, 528, 12, 70000), "blas f32, rows too long for as many as usual in a call");
    report(check_smallest_weight(), "matmul q8_0 with weights of -128");
    float_tiles::check_at_ends(report);
    products::check_all(report);
    small_ops::check_all(report);
    attention::check_all(report);
    strips::check_all(report);
    float_tiles::check_all(report);
    return n_failed != 0;
}
