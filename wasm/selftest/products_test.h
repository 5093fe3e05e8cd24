// Checks of the products with every weight type, one row and four, and of the activation functions, against double precision.
// Weights are random bytes, so that every code and every packed scale occurs, with scales of all kinds, and end where the
// memory ends: a kernel that reads beyond its rows traps.
#pragma once

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "llamafile/sgemm.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace products {

using report_function = void (*)(bool, const std::string &);

// A weight type and where its blocks hold their scales in half precision.
struct format {
    ggml_type        type;
    std::vector<int> scales;
};

static const format FORMATS[] = {
    {GGML_TYPE_Q4_0, {0}},      {GGML_TYPE_Q4_1, {0, 2}},   {GGML_TYPE_Q5_0, {0}},   {GGML_TYPE_Q5_1, {0, 2}}, {GGML_TYPE_Q8_0, {0}},
    {GGML_TYPE_IQ4_NL, {0}},    {GGML_TYPE_MXFP4, {}},      {GGML_TYPE_Q4_K, {0, 2}}, {GGML_TYPE_Q5_K, {0, 2}}, {GGML_TYPE_Q6_K, {208}},
    {GGML_TYPE_Q2_K, {80, 82}}, {GGML_TYPE_Q3_K, {108}},    {GGML_TYPE_TQ2_0, {64}}, {GGML_TYPE_IQ4_XS, {0}},
};

// The last n bytes of the memory.
static uint8_t * end_of_memory(size_t n) {
    static const size_t N_PAGES = 8, PAGE = 65536;
    static const size_t end = (__builtin_wasm_memory_grow(0, N_PAGES) + N_PAGES) * PAGE;
    if (n > N_PAGES * PAGE || end != __builtin_wasm_memory_size(0) * PAGE) {
        __builtin_trap();  // something else has grown the memory: nothing would be tested
    }
    return (uint8_t *) end - n;
}

static void set_half(uint8_t * p, float value) {
    const ggml_fp16_t half = ggml_fp32_to_fp16(value);
    memcpy(p, &half, sizeof(half));
}

// code: what all bytes of codes are, with large scales, or -1 for random ones.
static void fill_weights(const format & f, uint8_t * blocks, size_t n_blocks, std::mt19937 & random, int code = -1) {
    static const float SCALES[] = {0.013f, -0.013f, 1.0f, 0.0f, 0x1p-24f, -0x3p-24f, 0x1p-14f, 0x3ffp-24f, 1000.0f, -0.5f};
    const size_t size = ggml_type_size(f.type);
    for (size_t i = 0; i < n_blocks * size; i++) {
        blocks[i] = code < 0 ? (uint8_t) random() : (uint8_t) code;
        if (f.type == GGML_TYPE_Q8_0 && blocks[i] == 0x80) {
            blocks[i] = 0x81;  // no quantizer writes -128
        }
    }
    for (size_t i = 0; i < n_blocks; i++) {
        if (code >= 0 && (f.type == GGML_TYPE_Q4_K || f.type == GGML_TYPE_Q5_K)) {
            memset(blocks + i * size + offsetof(block_q4_K, scales), 0x7f, K_SCALE_SIZE);
        } else if (code >= 0 && f.type == GGML_TYPE_Q6_K) {
            memset(blocks + i * size + offsetof(block_q6_K, scales), 0x7f, QK_K / 16);
        }
        for (int at : f.scales) {
            set_half(blocks + i * size + at, SCALES[random() % std::size(SCALES)]);
        }
        if (f.type == GGML_TYPE_MXFP4) {
            blocks[i * size] = random() % 4 ? (uint8_t) (110 + random() % 30) : (uint8_t) (random() % 4);
        }
    }
}

// Activations as blocks of q8_0, q8_1 or q8_K, and the values they stand for.
// extreme: what all of their codes are, or 0 for many.
static std::vector<float> fill_activations(ggml_type type, uint8_t * row, int64_t n, std::mt19937 & random, int extreme = 0) {
    std::vector<float> values(n);
    const int64_t      size = ggml_blck_size(type);
    for (int64_t i = 0; i < n; i += size, row += ggml_type_size(type)) {
        const int   kind  = extreme ? (extreme < 0) : (int) (random() % 4);
        const float scale = ggml_fp16_to_fp32(ggml_fp32_to_fp16(0.001f * (float) (1 + random() % 100)));
        int8_t *    qs    = (int8_t *) row + (type == GGML_TYPE_Q8_0 ? 2 : 4);
        int         sum = 0, group = 0;
        for (int64_t j = 0; j < size; j++) {
            qs[j] = (int8_t) (kind == 0 ? 127 : kind == 1 ? -127 : (int) (random() % 255) - 127);
            sum += qs[j];
            group = j % 16 ? group + qs[j] : qs[j];
            values[i + j] = scale * (float) qs[j];
            if (type == GGML_TYPE_Q8_K && j % 16 == 15) {
                const int16_t bsum = (int16_t) group;
                memcpy(row + 4 + size + 2 * (j / 16), &bsum, sizeof(bsum));
            }
        }
        type == GGML_TYPE_Q8_K ? (void) memcpy(row, &scale, sizeof(scale)) : set_half(row, scale);
        if (type == GGML_TYPE_Q8_1) {
            set_half(row + 2, scale * (float) sum);
        }
    }
    return values;
}

// unit: what a product is rounded to, however small
static bool is_near(float result, const float * w, const float * y, int64_t n, double tolerance, double unit) {
    double expected = 0.0, size = 0.0;
    for (int64_t i = 0; i < n; i++) {
        expected += (double) w[i] * y[i];
        size += std::fabs((double) w[i] * y[i]);
    }
    return std::fabs(result - expected) <= tolerance * size + unit * (double) n + 1e-38;  // false for NaN
}

#define N_PRODUCT_COLS 6

// m rows of n values against one, two and all columns, by rows of four, and row by row.
static bool check_rows(ggml_type type, int64_t m, int64_t n, const uint8_t * w, const uint8_t * y, const float * y_values,
                       double tolerance) {
    const auto *        traits = ggml_get_type_traits_cpu(type);
    const ggml_type     y_type = traits->vec_dot_type;
    const size_t        w_row = ggml_row_size(type, n), y_row = ggml_row_size(y_type, n);
    std::vector<float>  w_values(n), result(N_PRODUCT_COLS * m);
    ggml_compute_params params = {};
    params.nth = 1;
    const double unit  = type == GGML_TYPE_F16 ? 0x1p-52 : 0.0;
    bool         is_ok = true;
    for (int64_t n_cols : {1, 2, N_PRODUCT_COLS}) {
        std::fill(result.begin(), result.end(), NAN);
        is_ok = is_ok && llamafile_sgemm(&params, m, n_cols, n / ggml_blck_size(type), w, n / ggml_blck_size(type), y,
                                         n / ggml_blck_size(y_type), result.data(), m, type, y_type, GGML_TYPE_F32);
        for (int64_t i = 0; i < m; i++) {
            if (type == GGML_TYPE_F32) {
                memcpy(w_values.data(), w + i * w_row, w_row);
            } else {
                ggml_get_type_traits(type)->to_float(w + i * w_row, w_values.data(), n);
            }
            for (int64_t j = 0; j < n_cols; j++) {
                float dot = NAN;
                traits->vec_dot((int) n, &dot, 0, w + i * w_row, 0, y + j * y_row, 0, 1);
                is_ok = is_ok && is_near(result[j * m + i], w_values.data(), y_values + j * n, n, tolerance, unit);
                is_ok = is_ok && is_near(dot, w_values.data(), y_values + j * n, n, tolerance, unit);
            }
        }
    }
    return is_ok;
}

static bool check_format(const format & f, int64_t m, int64_t n_blocks) {
    const ggml_type      y_type = ggml_get_type_traits_cpu(f.type)->vec_dot_type;
    const int64_t        n      = n_blocks * ggml_blck_size(f.type);
    std::mt19937         random((unsigned) (f.type * 100 + m * 10 + n_blocks));
    std::vector<uint8_t> y(N_PRODUCT_COLS * ggml_row_size(y_type, n));
    const size_t         w_bytes = m * ggml_row_size(f.type, n);
    bool                 is_ok   = true;
    for (int round = 0; round < 20; round++) {
        uint8_t * w = end_of_memory(w_bytes);
        fill_weights(f, w, m * n_blocks, random);
        const std::vector<float> values = fill_activations(y_type, y.data(), N_PRODUCT_COLS * n, random);
        // q8_1 keeps the sum of a block in half precision: one part in two thousand
        const double tolerance = y_type == GGML_TYPE_Q8_1 ? 2e-3 : 2e-6;
        is_ok = is_ok && check_rows(f.type, m, n, w, y.data(), values.data(), tolerance);
        memcpy(end_of_memory(y.size()), y.data(), y.size());
        std::vector<uint8_t> copy(w_bytes);
        fill_weights(f, copy.data(), m * n_blocks, random);
        is_ok = is_ok && check_rows(f.type, m, n, copy.data(), end_of_memory(y.size()), values.data(), tolerance);
    }
    return is_ok;
}

// The largest sums there are: what overflows does so here.
static bool check_extremes(const format & f) {
    const int64_t        m = 13, n_blocks = 3, n = n_blocks * ggml_blck_size(f.type);
    const ggml_type      y_type = ggml_get_type_traits_cpu(f.type)->vec_dot_type;
    std::mt19937         random(f.type);
    std::vector<uint8_t> y(N_PRODUCT_COLS * ggml_row_size(y_type, n)), w(m * ggml_row_size(f.type, n));
    bool                 is_ok = true;
    for (int code : {0x00, 0xff, 0x7f, 0x80, 0x0f, 0xf0}) {
        for (int extreme : {127, -127}) {
            fill_weights(f, w.data(), m * n_blocks, random, code);
            const std::vector<float> values = fill_activations(y_type, y.data(), N_PRODUCT_COLS * n, random, extreme);
            const double tolerance = y_type == GGML_TYPE_Q8_1 ? 2e-3 : 2e-6;
            is_ok = is_ok && check_rows(f.type, m, n, w.data(), y.data(), values.data(), tolerance);
        }
    }
    return is_ok;
}

// f16, bf16 and f32: any number of values, subnormal and large ones among them.
static bool check_floats(ggml_type type, int64_t m) {
    std::mt19937                          random(type);
    std::normal_distribution<float>       normal;
    std::uniform_real_distribution<float> exponent(-24.0f, 12.0f);
    bool is_ok = true;
    for (int64_t n = 1; n < 90; n++) {
        const size_t       row = ggml_row_size(type, n);
        std::vector<float> values((m + N_PRODUCT_COLS) * n);
        for (float & value : values) {
            value = random() % 50 ? std::exp2(exponent(random)) * normal(random) : 0.0f;
        }
        uint8_t *            w = end_of_memory(m * row);
        std::vector<uint8_t> y(N_PRODUCT_COLS * row);
        const float *        y_values = values.data() + m * n;
        ggml_get_type_traits_cpu(type)->from_float(values.data(), w, m * n);
        ggml_get_type_traits_cpu(type)->from_float(y_values, y.data(), N_PRODUCT_COLS * n);
        std::vector<float> y_read(y_values, y_values + N_PRODUCT_COLS * n);
        if (type != GGML_TYPE_F32) {
            ggml_get_type_traits(type)->to_float(y.data(), y_read.data(), N_PRODUCT_COLS * n);
        }
        is_ok = is_ok && check_rows(type, m, n, w, y.data(), y_read.data(), 1e-6);
        std::vector<uint8_t> copy(w, w + m * row);
        memcpy(end_of_memory(y.size()), y.data(), y.size());
        is_ok = is_ok && check_rows(type, m, n, copy.data(), end_of_memory(y.size()), y_read.data(), 1e-6);
    }
    return is_ok;
}

// A mixture of experts against the products with each token's own experts. n_slots: 1 if all experts of a token see the same
// activations, else as many as it has.
static bool check_experts(ggml_type type, int64_t n_tokens, int64_t n_slots, int n_threads) {
    const int64_t k = 256, m = 70, n_experts = 5, n_used = 3;
    ggml_context * ctx = ggml_init({16u << 20, nullptr, false});
    std::mt19937   random((unsigned) (type + n_tokens));
    std::normal_distribution<float> normal;
    ggml_tensor * w   = ggml_new_tensor_3d(ctx, type, k, m, n_experts);
    ggml_tensor * y   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, n_slots, n_tokens);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_used, n_tokens);
    std::vector<float> values(ggml_nelements(w));
    for (float & value : values) { value = normal(random); }
    ggml_quantize_chunk(type, values.data(), w->data, 0, m * n_experts, k, nullptr);
    for (int64_t i = 0; i < ggml_nelements(y); i++) { ((float *) y->data)[i] = normal(random); }
    for (int64_t t = 0; t < n_tokens; t++) {
        const int first = (int) (random() % n_experts);  // different experts for one token; expert 0 gets most
        for (int64_t u = 0; u < n_used; u++) {
            ((int32_t *) ids->data)[t * n_used + u] = t % 2 ? (int) (first + u) % (int) n_experts : (int) u;
        }
    }
    ggml_tensor * out   = ggml_mul_mat_id(ctx, w, y, ids);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    ggml_graph_compute_with_ctx(ctx, graph, n_threads);
    const ggml_type      y_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
    std::vector<uint8_t> quantized(ggml_row_size(y_type, k));
    bool is_ok = true;
    for (int64_t t = 0; t < n_tokens; t++) for (int64_t u = 0; u < n_used; u++) {
        const float * x = (const float *) y->data + (t * n_slots + u % n_slots) * k;
        ggml_get_type_traits_cpu(y_type)->from_float(x, quantized.data(), k);
        for (int64_t i = 0; i < m; i++) {
            const int64_t row      = ((int32_t *) ids->data)[t * n_used + u] * m + i;
            float         expected = NAN;
            const uint8_t * weights = (const uint8_t *) w->data + row * w->nb[1];
            ggml_get_type_traits_cpu(type)->vec_dot(k, &expected, 0, weights, 0, quantized.data(), 0, 1);
            is_ok = is_ok && std::fabs(((float *) out->data)[(t * n_used + u) * m + i] - expected) <= 1e-3f;
        }
    }
    ggml_free(ctx);
    return is_ok;
}

// Products of a whole graph: the same bits whatever the number of threads, which take shares of the rows as they come. With
// several products in one operation only the first is shared out so.
static std::vector<float> multiply_in_graph(ggml_type type, int64_t k, int64_t n, int64_t n_products, int n_threads) {
    const int64_t  m   = 301;
    ggml_context * ctx = ggml_init({32u << 20, nullptr, false});
    std::mt19937   random(5);
    std::normal_distribution<float> normal;
    ggml_tensor * w = ggml_new_tensor_2d(ctx, type, k, m);
    ggml_tensor * y = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, n, n_products);
    std::vector<float> values(ggml_nelements(w));
    for (float & value : values) { value = normal(random); }
    ggml_quantize_chunk(type, values.data(), w->data, 0, m, k, nullptr);
    for (int64_t i = 0; i < ggml_nelements(y); i++) { ((float *) y->data)[i] = normal(random); }
    ggml_tensor * out   = ggml_mul_mat(ctx, w, y);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    ggml_graph_compute_with_ctx(ctx, graph, n_threads);
    std::vector<float> result((float *) out->data, (float *) out->data + ggml_nelements(out));
    ggml_free(ctx);
    return result;
}

static bool check_shares(ggml_type type, int64_t n, int64_t n_products) {
    for (int64_t k : {256, 2048}) {  // in one part, and beyond what is kept of the activations
        const std::vector<float> expected = multiply_in_graph(type, k, n, n_products, 1);
        for (int n_threads : {2, 3}) {
            const std::vector<float> found = multiply_in_graph(type, k, n, n_products, n_threads);
            if (memcmp(found.data(), expected.data(), expected.size() * sizeof(float)) != 0) { return false; }
        }
    }
    return true;
}

template <typename T> static bool is_same(const T & a, const T & b) {
    return memcmp(&a, &b, sizeof(T)) == 0;
}

// Any bits, the neighbours of a half's, and values halfway between halves.
static float draw_float(uint32_t i, std::mt19937 & random) {
    const uint32_t sign = i << 31, halfway = 0x38000000 + i % 0x800 * 0x1000, near_half = i << 16 | (0x0fff + random() % 3);
    const uint32_t bits = i % 3 == 0 ? (uint32_t) random() : i % 3 == 1 ? near_half : halfway | sign;
    float          value;
    memcpy(&value, &bits, sizeof(bits));
    return value;
}

// Rows of every half to f32, and of floats of all kinds to halves, in pieces of every length up to the end of the memory: the
// bits of ggml's conversion of one value, but for what a NaN holds.
static bool check_halves() {
    std::mt19937 random(11);
    bool         is_ok = true;
    for (uint32_t at = 0, n = 1; at < 65536; at += n, n = n % 21 + 1) {
        n = std::min(n, 65536 - at);
        uint16_t * h = (uint16_t *) end_of_memory(2 * n);
        float      f[21];
        for (uint32_t i = 0; i < n; i++) { h[i] = (uint16_t) (at + i); }
        ggml_cpu_fp16_to_fp32(h, f, n);
        for (uint32_t i = 0; i < n; i++) {
            const float expected = ggml_fp16_to_fp32(h[i]);
            is_ok = is_ok && (std::isnan(expected) ? std::isnan(f[i]) : is_same(f[i], expected));
        }
        ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) h, f, n);
        for (uint32_t i = 0; i < n; i++) { is_ok = is_ok && is_same(f[i], ggml_bf16_to_fp32(((const ggml_bf16_t *) h)[i])); }
        float *     x = (float *) end_of_memory(4 * n);
        ggml_fp16_t f16[21];
        ggml_bf16_t bf16[21];
        for (uint32_t i = 0; i < n; i++) { x[i] = draw_float(at + i, random); }
        ggml_cpu_fp32_to_fp16(x, f16, n);
        ggml_cpu_fp32_to_bf16(x, bf16, n);
        for (uint32_t i = 0; i < n; i++) {
            is_ok = is_ok && is_same(f16[i], ggml_fp32_to_fp16(x[i])) && is_same(bf16[i], ggml_fp32_to_bf16(x[i]));
        }
    }
    return is_ok && ggml_get_type_traits_cpu(GGML_TYPE_F16)->from_float == (ggml_from_float_t) ggml_cpu_fp32_to_fp16;
}

static bool is_close(float result, double expected) {
    return std::isnan(expected) ? std::isnan(result) : std::fabs(result - expected) <= 4e-7 * std::fabs(expected) + 1e-34;
}

// SiLU, SwiGLU and softmax at values up to and beyond what an exponential holds, in place and not.
static bool check_activations() {
    std::mt19937                          random(3);
    std::uniform_real_distribution<float> wide(-200.0f, 200.0f), narrow(-8.0f, 8.0f);
    bool is_ok = true;
    for (int n = 1; n < 70; n++) {
        std::vector<float> x(n), g(n), y(n);
        for (int i = 0; i < n; i++) {
            x[i] = i % 2 ? wide(random) : i % 16 == 4 ? 0.0f : narrow(random);
            g[i] = narrow(random);
        }
        const auto silu = [&](int i) { return x[i] / (1.0 + std::exp(-(double) x[i])); };
        ggml_vec_silu_f32(n, y.data(), x.data());
        for (int i = 0; i < n; i++) { is_ok = is_ok && is_close(y[i], silu(i)); }
        ggml_vec_swiglu_f32(n, y.data(), x.data(), g.data());
        for (int i = 0; i < n; i++) { is_ok = is_ok && is_close(y[i], silu(i) * g[i]); }
        x[random() % n] = -INFINITY;
        float max = -INFINITY;
        for (float value : x) { max = std::fmax(max, value); }
        max = max == -INFINITY ? 0.0f : max;
        double sum = 0.0;
        y = x;
        const double result = ggml_vec_soft_max_f32(n, y.data(), y.data(), max);
        for (int i = 0; i < n; i++) {
            sum += std::exp((double) (x[i] - max));
            is_ok = is_ok && is_close(y[i], std::exp((double) (x[i] - max)));
        }
        is_ok = is_ok && std::fabs(result - sum) <= 1e-6 * sum;
    }
    float nan[5] = {NAN, 1, 2, 3, NAN}, y[5];
    ggml_vec_silu_f32(5, y, nan);
    is_ok = is_ok && std::isnan(y[0]) && std::isnan(y[4]) && is_close(y[1], 1.0 / (1.0 + std::exp(-1.0)));
    return is_ok && std::isnan(ggml_vec_soft_max_f32(5, y, nan, 3.0f)) && std::isnan(y[0]) && std::isnan(y[4]) && y[3] == 1.0f;
}

static void check_all(report_function report) {
    for (const format & f : FORMATS) {
        const std::string name = std::string("every code: ") + ggml_type_name(f.type);
        for (int64_t m : {19, 16, 7, 4, 1}) {
            for (int64_t n_blocks : {1, 2, 4, 7}) {
                report(check_format(f, m, n_blocks), name + ", " + std::to_string(m) + " rows of " + std::to_string(n_blocks) + " blocks");
            }
        }
        report(check_extremes(f), name + ", the largest sums");
        if (ggml_blck_size(f.type) == 32) {
            report(check_format(f, 5, 183), name + ", long rows");
        }
    }
    for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
        for (int64_t m : {6, 1}) {
            report(check_floats(type, m), std::string("floats: ") + ggml_type_name(type) + ", " + std::to_string(m) + " rows");
        }
    }
    report(check_halves(), "rows of halves to floats and back");
    for (ggml_type type : {GGML_TYPE_Q4_K, GGML_TYPE_Q8_0, GGML_TYPE_MXFP4, GGML_TYPE_F16, GGML_TYPE_Q4_1, GGML_TYPE_NVFP4, GGML_TYPE_F32}) {
        for (int64_t n_tokens : {1, 2, 80}) {
            for (int n_threads : {1, 3}) {
                const std::string name = std::string("experts: ") + ggml_type_name(type) + ", tokens " + std::to_string(n_tokens);
                report(check_experts(type, n_tokens, n_tokens == 2 ? 3 : 1, n_threads), name + ", threads " + std::to_string(n_threads));
            }
        }
    }
    report(check_activations(), "SiLU, SwiGLU and softmax");
    for (ggml_type type : {GGML_TYPE_Q4_K, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_F16}) {
        for (int64_t n : {1, 6, 70}) {
            for (int64_t n_products : {1, 3}) {
                report(check_shares(type, n, n_products), std::string("shares: ") + ggml_type_name(type) + ", columns " + std::to_string(n) +
                                                              ", products " + std::to_string(n_products));
            }
        }
    }
}

}  // namespace products
