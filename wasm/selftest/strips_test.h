// Checks of repacked weights (kernels/repack.cpp): what goes into such a buffer comes out again, and products with it are those
// with the weights as they lie in a file, which products_test.h holds against double precision.
#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "../kernels/blas.h"
#include "products_test.h"

ggml_backend_buffer_type_t pw_repack_buffer_type(void);

namespace strips {

struct shape {
    int64_t m, n, n_blocks;
    int     blas;
};

static const shape SHAPES[] = {
    {8, 1, 1, BLAS_OFF}, {64, 1, 3, BLAS_OFF}, {200, 2, 9, BLAS_OFF}, {72, 3, 7, BLAS_OFF}, {24, 3, 500, BLAS_OFF}, {16, 1, 700, BLAS_OFF},
    {40, 4, 5, BLAS_OFF}, {88, 9, 4, BLAS_OFF}, {48, 70, 6, BLAS_OFF}, {72, 520, 8, BLAS_WHOLE},
    {136, 516, 9, BLAS_SLICES}, {48, 514, 72, BLAS_SLICES},
};

static std::vector<float> multiply(ggml_context * context, ggml_tensor * weights, ggml_tensor * y, int n_threads) {
    ggml_tensor *        out   = ggml_mul_mat(context, weights, y);
    ggml_cgraph *        graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, out);
    ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();
    ggml_graph_compute(graph, &plan);
    const float * data = (const float *) out->data;
    return std::vector<float>(data, data + ggml_nelements(out));
}

// Sums may be added up in another order, and BLAS adds up in one of its own.
static bool are_close(const std::vector<float> & a, const std::vector<float> & b) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < a.size(); i++) {
        difference += ((double) a[i] - b[i]) * ((double) a[i] - b[i]);
        size += (double) b[i] * b[i];
    }
    return a.size() == b.size() && size > 0 && difference <= 1e-10 * size;
}

// code: of all weights, with activations of 1 or -1, for the largest sums there are; or -1 for random ones.
static bool check(const products::format & f, const shape & s, int n_threads, int code = -1) {
    std::mt19937   random(7);
    const int64_t  k       = s.n_blocks * ggml_blck_size(f.type);
    ggml_context * context = ggml_init({(size_t) (ggml_row_size(f.type, k) * s.m + 4 * (k + 2 * s.m + 64) * s.n + (1 << 20)), nullptr, false});
    ggml_context * outside = ggml_init({1 << 16, nullptr, true});
    ggml_tensor *  plain = ggml_new_tensor_2d(context, f.type, k, s.m), * y = ggml_new_tensor_2d(context, GGML_TYPE_F32, k, s.n);
    ggml_tensor *  repacked = ggml_new_tensor_2d(outside, f.type, k, s.m);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(outside, pw_repack_buffer_type());
    products::fill_weights(f, (uint8_t *) plain->data, (size_t) (s.n_blocks * s.m), random, code);
    for (int64_t i = 0; i < k * s.n; i++) {
        const float value      = (float) ((int) (random() % 2001) - 1000) * 0.001f;
        ((float *) y->data)[i] = code < 0 ? value : i / k % 2 ? 1.0f : -1.0f;
    }
    std::vector<uint8_t> bytes(ggml_nbytes(plain));
    ggml_backend_tensor_set(repacked, plain->data, 0, bytes.size());
    ggml_backend_tensor_get(repacked, bytes.data(), 0, bytes.size());
    pw_set_blas(s.blas);
    bool is_ok = memcmp(bytes.data(), plain->data, bytes.size()) == 0 && memcmp(repacked->data, plain->data, bytes.size()) != 0;
    is_ok      = is_ok && are_close(multiply(context, repacked, y, n_threads), multiply(context, plain, y, n_threads));
    pw_set_blas(BLAS_OFF);
    ggml_backend_buffer_free(buffer);
    ggml_free(outside);
    ggml_free(context);
    return is_ok;
}

static void check_all(products::report_function report) {
    for (const auto & f : products::FORMATS) {
        const bool is_repacked = f.type == GGML_TYPE_Q4_0 || f.type == GGML_TYPE_Q4_1 || f.type == GGML_TYPE_Q5_0 || f.type == GGML_TYPE_Q5_1
                                 || f.type == GGML_TYPE_Q4_K || f.type == GGML_TYPE_Q5_K || f.type == GGML_TYPE_Q6_K;
        for (int code : {0x00, 0xff, 0x7f, 0x80}) {
            for (int64_t n : {1, 3, 6}) {
                if (is_repacked) {
                    report(check(f, {16, n, 3, BLAS_OFF}, 1, code), std::string("repacked ") + ggml_type_name(f.type) + ", "
                           + std::to_string(n) + " columns, all of " + std::to_string(code));
                }
            }
        }
        for (const auto & s : SHAPES) {
            for (int n_threads : {1, 3}) {
                if (is_repacked) {
                    report(check(f, s, n_threads), std::string("repacked ") + ggml_type_name(f.type) + ", " + std::to_string(s.m) + " rows, "
                           + std::to_string(s.n) + " columns of " + std::to_string(s.n_blocks) + " blocks, threads " + std::to_string(n_threads)
                           + (s.blas == BLAS_OFF ? "" : s.blas == BLAS_WHOLE ? ", blas" : ", blas in slices"));
                }
            }
        }
    }
}

}  // namespace strips
