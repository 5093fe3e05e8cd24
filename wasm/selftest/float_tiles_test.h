// Checks of products of f16, bf16 and f32 weights with several columns of activations: against double precision, rows and
// columns that lie apart, the end of the memory, shares of threads, and numbers that are none.
#pragma once

#include "products_test.h"

namespace float_tiles {

static const ggml_type TYPES[] = {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32};

// m rows and n columns of k values, each row and column `gap` values apart from the next.
struct operands {
    ggml_type            type;
    int64_t              m, n, k, gap;
    std::vector<uint8_t> w, y;
    std::vector<float>   w_values, y_values;

    operands(ggml_type type, int64_t m, int64_t n, int64_t k, int64_t gap) : type(type), m(m), n(n), k(k), gap(gap) {
        std::mt19937 random((unsigned) (type + m * 7 + n * 31 + k));
        fill(m, w, w_values, random);
        fill(n, y, y_values, random);
    }

    void fill(int64_t n_rows, std::vector<uint8_t> & bytes, std::vector<float> & values, std::mt19937 & random) const {
        std::normal_distribution<float>       normal;
        std::uniform_real_distribution<float> exponent(-24.0f, 6.0f);
        values.resize(n_rows * (k + gap) - gap);
        for (float & value : values) { value = random() % 50 ? std::exp2(exponent(random)) * normal(random) : 0.0f; }
        bytes.resize(values.size() * ggml_type_size(type));
        ggml_get_type_traits_cpu(type)->from_float(values.data(), bytes.data(), (int64_t) values.size());
        if (type != GGML_TYPE_F32) { ggml_get_type_traits(type)->to_float(bytes.data(), values.data(), (int64_t) values.size()); }
    }

    void set_weight(int64_t row, int64_t at, uint32_t bits) { set(w, row, at, bits); }
    void set_activation(int64_t column, int64_t at, uint32_t bits) { set(y, column, at, bits); }
    void set(std::vector<uint8_t> & bytes, int64_t row, int64_t at, uint32_t bits) const {
        memcpy(bytes.data() + (row * (k + gap) + at) * ggml_type_size(type), &bits, ggml_type_size(type));
    }

    // The first n_cols columns, by n_threads threads one after the other; or nothing where that was refused.
    std::vector<float> multiply(int64_t n_cols, int n_threads, const uint8_t * weights, const uint8_t * activations) const {
        std::vector<float> result(n_cols * m, -7.0f);
        for (int i = 0; i < n_threads; i++) {
            ggml_compute_params params = {};
            params.ith = i;
            params.nth = n_threads;
            if (!llamafile_sgemm(&params, m, n_cols, k, weights, k + gap, activations, k + gap, result.data(), m, type, type, GGML_TYPE_F32)) {
                return {};
            }
        }
        return result;
    }
    std::vector<float> multiply(int64_t n_cols, int n_threads) const { return multiply(n_cols, n_threads, w.data(), y.data()); }

    bool is_right(const std::vector<float> & result) const {
        const double unit  = type == GGML_TYPE_F16 ? 0x1p-52 : 0.0;
        bool         is_ok = !result.empty();
        for (size_t i = 0; is_ok && i < result.size(); i++) {
            const int64_t row = (int64_t) i % m, column = (int64_t) i / m;
            is_ok = products::is_near(result[i], &w_values[row * (k + gap)], &y_values[column * (k + gap)], k, 1e-6, unit);
        }
        return is_ok;
    }
};

static bool is_same(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && !a.empty() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Any number of columns and values, up to what is taken at once and beyond.
static bool check_sizes(ggml_type type, int64_t k) {
    bool is_ok = true;
    for (int64_t n : {2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 33, 64, 65, 70}) {
        for (int64_t m : {1, 3, 4, 21}) {
            if (k > 500 && (m == 3 || n == 9 || n == 13)) { continue; }
            const operands o(type, m, n, k, n % 3);
            is_ok = is_ok && o.is_right(o.multiply(n, 1));
        }
    }
    return is_ok;
}

// Nothing is read behind the last weight and the last activation.
static bool check_ends(ggml_type type) {
    bool is_ok = true;
    for (int64_t k = 1; k < 70; k++) {
        const operands o(type, 9, 7, k, 5);
        uint8_t *      end = products::end_of_memory(o.w.size());
        memcpy(end, o.w.data(), o.w.size());
        is_ok = is_ok && o.is_right(o.multiply(7, 1, end, o.y.data()));
        end = products::end_of_memory(o.y.size());
        memcpy(end, o.y.data(), o.y.size());
        is_ok = is_ok && o.is_right(o.multiply(7, 1, o.w.data(), end));
    }
    return is_ok;
}

// The same bits by any number of threads and whatever is multiplied beside.
static bool check_company(ggml_type type, int64_t k) {
    const operands           o(type, 75, 23, k, 0);
    const std::vector<float> all = o.multiply(23, 1);
    bool is_ok = true;
    for (int n_threads : {2, 3, 16}) { is_ok = is_ok && is_same(o.multiply(23, n_threads), all); }
    for (int64_t n : {4, 5, 8, 22}) {
        is_ok = is_ok && is_same(o.multiply(n, 1), std::vector<float>(all.begin(), all.begin() + n * o.m));
    }
    return is_ok;
}

// An infinity or NaN makes the results of its row, or column, no finite number, and no other. Among weights of f16 it counts as
// the number its bits would be with one exponent more, from 65536 on, as in products with one column.
static bool check_not_finite(ggml_type type) {
    const int      shift = type == GGML_TYPE_F32 ? 16 : 0;
    const uint32_t one = type == GGML_TYPE_F16 ? 0x3c00 : 0x3f80, infinity = type == GGML_TYPE_F16 ? 0x7c00 : 0x7f80;
    bool           is_ok = true;
    for (int64_t at = 0; at < 19; at++) {
        for (uint32_t bits : {infinity, infinity | 0x8000u, infinity | 0x41u, type == GGML_TYPE_F16 ? 0x7bffu : 0x7e00u}) {
            const bool is_finite = (bits & infinity) != infinity;
            for (bool is_weight : {true, false}) {
                operands o(type, 9, 6, 19, 0);
                for (int64_t i = 0; i < 9; i++) { o.set_weight(i, at, one << shift); }
                for (int64_t i = 0; i < 6; i++) { o.set_activation(i, at, one << shift); }
                is_weight ? o.set_weight(5, at, bits << shift) : o.set_activation(2, at, bits << shift);
                const bool is_number = is_finite || (is_weight && type == GGML_TYPE_F16);
                const std::vector<float> result = o.multiply(6, 1), alone = o.multiply(1, 1);
                is_ok = is_ok && !alone.empty() && (!is_number || std::fabs(result[5] - alone[5]) <= 1e-6f * std::fabs(alone[5]));
                for (int64_t i = 0; i < 9 * 6; i++) {
                    const bool is_hit = is_weight ? i % 9 == 5 : i / 9 == 2;
                    is_ok = is_ok && !result.empty() && std::isfinite(result[i]) == (is_number || !is_hit);
                }
            }
        }
    }
    return is_ok;
}

// Before anything needs much memory, which then has another end.
static void check_at_ends(products::report_function report) {
    for (ggml_type type : TYPES) {
        report(check_ends(type), std::string("columns of ") + ggml_type_name(type) + ", at the end of the memory");
    }
}

static void check_all(products::report_function report) {
    for (ggml_type type : TYPES) {
        const std::string name = std::string("columns of ") + ggml_type_name(type);
        // 5121: many times what is multiplied at a time; 23041: more than fits four times; 92161: not even once, which is another kernel's
        for (int64_t k : {1, 4, 15, 33, 129, 1000}) { report(check_sizes(type, k), name + ", " + std::to_string(k) + " values"); }
        for (int64_t k : {5121, 23041, 92161}) {
            const operands o(type, 5, 6, k, 1);
            report(o.is_right(o.multiply(6, 1)), name + ", " + std::to_string(k) + " values");
        }
        report(check_company(type, 200), name + ", alone and together");
        report(check_company(type, 6000), name + ", alone and together, long");
        report(check_not_finite(type), name + ", infinities and NaN");
    }
}

}  // namespace float_tiles
