// Checks of normalizations, rotary positions, the forms of GELU, and activations in q8_K: against upstream's own functions, which
// go value by value and are still linked under other names, and against double precision; the same bits for any number of threads.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "ops.h"
#include "vec.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

extern "C" {
void upstream_ggml_compute_forward_norm(const ggml_compute_params * params, ggml_tensor * dst);
void upstream_ggml_compute_forward_l2_norm(const ggml_compute_params * params, ggml_tensor * dst);
void upstream_ggml_compute_forward_group_norm(const ggml_compute_params * params, ggml_tensor * dst);
void upstream_ggml_compute_forward_rms_norm(const ggml_compute_params * params, ggml_tensor * dst);
void upstream_ggml_compute_forward_rms_norm_mul_fused(const ggml_compute_params * params, ggml_tensor * norm, ggml_tensor * dst);
void upstream_ggml_compute_forward_rope(const ggml_compute_params * params, ggml_tensor * dst);
void pw_vec_gelu_f32(int n, float * y, const float * x);
void pw_vec_gelu_erf_f32(int n, float * y, const float * x);
void pw_vec_gelu_quick_f32(int n, float * y, const float * x);
void pw_vec_geglu_f32(int n, float * y, const float * x, const float * g);
void pw_vec_geglu_erf_f32(int n, float * y, const float * x, const float * g);
void pw_vec_geglu_quick_f32(int n, float * y, const float * x, const float * g);
void quantize_row_q8_K(const float * x, void * y, int64_t k);
void quantize_row_q8_K_ref(const float * x, block_q8_K * y, int64_t k);
}

namespace small_ops {

using report_function = void (*)(bool, const std::string &);
using forward         = std::function<void(const ggml_compute_params *)>;

struct arena {
    ggml_context * ctx = ggml_init({(size_t) 64 << 20, nullptr, false});
    std::mt19937   random{11};
    ~arena() { ggml_free(ctx); }

    ggml_tensor * draw(int64_t n0, int64_t n1, int64_t n2, int64_t n3, float scale = 1.0f, float shift = 0.0f) {
        ggml_tensor *                   t = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n0, n1, n2, n3);
        std::normal_distribution<float> normal(shift, scale);
        for (int64_t i = 0; i < ggml_nelements(t); i++) { ((float *) t->data)[i] = normal(random); }
        return t;
    }
};

// What `run` leaves in dst with that many threads; what was in the source before is put back.
static std::vector<float> result_of(const forward & run, ggml_tensor * dst, ggml_tensor * src, int n_threads) {
    const std::vector<uint8_t> before((uint8_t *) src->data, (uint8_t *) src->data + ggml_nbytes(src));
    std::vector<float>         work(n_threads * (dst->ne[0] + 64), NAN);
    if (dst->data != src->data) { memset(dst->data, 0xff, ggml_nbytes(dst)); }
    for (int ith = n_threads - 1; ith >= 0; ith--) {
        ggml_compute_params params = {};
        params.ith   = ith;
        params.nth   = n_threads;
        params.wdata = work.data();
        params.wsize = work.size() * sizeof(float);
        run(&params);
    }
    std::vector<float> result(ggml_nelements(dst));
    for (int64_t i = 0; i < (int64_t) result.size(); i++) {
        const int64_t i0 = i % dst->ne[0], i1 = i / dst->ne[0] % dst->ne[1], i2 = i / dst->ne[0] / dst->ne[1] % dst->ne[2],
                      i3 = i / dst->ne[0] / dst->ne[1] / dst->ne[2];
        memcpy(&result[i], (char *) dst->data + i0 * dst->nb[0] + i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3], sizeof(float));
    }
    memcpy(src->data, before.data(), before.size());
    return result;
}

// Ours with 1, 2 and 5 threads is the same to the last bit, and differs from upstream's by no more than `least` and a part
// of the value.
static bool is_same(const forward & ours, const forward & upstream, ggml_tensor * dst, ggml_tensor * src, float part, float least) {
    const std::vector<float> expected = result_of(upstream, dst, src, 1), found = result_of(ours, dst, src, 1);
    for (int n_threads : {2, 5}) {
        const std::vector<float> other = result_of(ours, dst, src, n_threads);
        if (memcmp(found.data(), other.data(), found.size() * sizeof(float))) { return false; }
    }
    for (size_t i = 0; i < found.size(); i++) {
        if (!(std::fabs(found[i] - expected[i]) <= part * std::fabs(expected[i]) + least)) { return false; }
    }
    return true;
}

#define FORWARD(function, dst) [=](const ggml_compute_params * params) { function(params, dst); }
#define BOTH(function, dst) FORWARD(function, dst), FORWARD(upstream_##function, dst), dst

static const int64_t WIDTHS[] = {1, 3, 4, 7, 8, 64, 576, 1023};

static void check_norms(report_function report) {
    for (int64_t n : WIDTHS) {
        arena               a;
        const std::string   width = ", rows of " + std::to_string(n);
        ggml_tensor * const x     = a.draw(n, 5, 2, 3, 3.0f, 10.0f);
        ggml_tensor *       y     = ggml_rms_norm(a.ctx, x, 1e-5f);
        report(is_same(BOTH(ggml_compute_forward_rms_norm, y), x, 1e-6f, 0), "rms_norm" + width);
        for (ggml_tensor * w : {a.draw(n, 1, 1, 1), a.draw(n, 5, 2, 1)}) {
            ggml_tensor * const product = ggml_mul(a.ctx, y, w);
            const auto ours     = [=](const ggml_compute_params * p) { ggml_compute_forward_rms_norm_mul_fused(p, y, product); };
            const auto upstream = [=](const ggml_compute_params * p) { upstream_ggml_compute_forward_rms_norm_mul_fused(p, y, product); };
            report(is_same(ours, upstream, product, x, 1e-6f, 0), "rms_norm and a product with " + std::to_string(w->ne[1]) + " rows" + width);
        }
        y = ggml_norm(a.ctx, x, 1e-5f);
        report(is_same(BOTH(ggml_compute_forward_norm, y), x, 2e-6f, 2e-6f), "norm" + width);
        y = ggml_l2_norm(a.ctx, x, 1e-5f);
        report(is_same(BOTH(ggml_compute_forward_l2_norm, y), x, 1e-6f, 0), "l2_norm" + width);
        ggml_tensor * const channels = a.draw(n, 3, 8, 2, 2.0f, 1.0f);
        y                            = ggml_group_norm(a.ctx, channels, 3, 1e-5f);  // the last group has fewer channels
        report(is_same(BOTH(ggml_compute_forward_group_norm, y), channels, 2e-6f, 2e-6f), "group_norm" + width);
    }
    arena               a;
    ggml_tensor * const wide = a.draw(100, 9, 4, 1), * const part = ggml_view_4d(a.ctx, wide, 37, 4, 3, 1, wide->nb[1] * 2, wide->nb[2], wide->nb[3], 12);
    ggml_tensor *       y    = ggml_rms_norm(a.ctx, part, 0.0f);
    report(is_same(BOTH(ggml_compute_forward_rms_norm, y), part, 1e-6f, 0), "rms_norm of a view");
    ggml_tensor * const turned = ggml_transpose(a.ctx, wide);
    y                          = ggml_norm(a.ctx, turned, 1e-5f);
    report(is_same(BOTH(ggml_compute_forward_norm, y), turned, 2e-6f, 2e-6f), "norm of columns");
    y = ggml_l2_norm(a.ctx, turned, 1e-5f);
    report(is_same(BOTH(ggml_compute_forward_l2_norm, y), turned, 1e-6f, 0), "l2_norm of columns");
    // Against double precision, with a large mean, where single precision would lose the variance.
    ggml_tensor * const far = a.draw(4096, 1, 1, 1, 1.0f, 300.0f);
    y                       = ggml_norm(a.ctx, far, 0.0f);
    const std::vector<float> found = result_of(FORWARD(ggml_compute_forward_norm, y), y, far, 1);
    double mean = 0.0, variance = 0.0, worst = 0.0;
    for (int i = 0; i < 4096; i++) { mean += ((float *) far->data)[i] / 4096.0; }
    for (int i = 0; i < 4096; i++) { variance += std::pow(((float *) far->data)[i] - mean, 2) / 4096.0; }
    for (int i = 0; i < 4096; i++) { worst = std::fmax(worst, std::fabs(found[i] - (((float *) far->data)[i] - mean) / std::sqrt(variance))); }
    report(worst < 5e-5, "norm with a large mean, against double precision");
}

struct rope_case {
    const char * name;
    int          mode;
    int64_t      width, n_dims, n_heads, n_tokens, n_batch;
    float        base, freq_scale, ext_factor, attn_factor;
    bool         has_factors, in_place;
    int          offset, first;
    int          sections[4];
};

static const rope_case ROPES[] = {
    {"normal",                 GGML_ROPE_TYPE_NORMAL, 64,  64,  9, 7, 1, 1e5f, 1,     0, 1,    false, false, 0,  0,       {}},
    {"normal, in place",       GGML_ROPE_TYPE_NORMAL, 128, 128, 3, 5, 2, 1e4f, 1,     0, 1,    false, true,  0,  1000,    {}},
    {"normal, in part",        GGML_ROPE_TYPE_NORMAL, 80,  20,  3, 5, 1, 1e4f, 0.25f, 0, 1,    false, false, 0,  70000,   {}},
    {"normal, YaRN, factors",  GGML_ROPE_TYPE_NORMAL, 96,  96,  2, 4, 1, 1e4f, 0.1f,  1, 1.1f, true,  false, 0,  500,     {}},
    {"neox",                   GGML_ROPE_TYPE_NEOX,   64,  64,  14, 6, 1, 1e6f, 1,    0, 1,    false, false, 0,  0,       {}},
    {"neox, one token",        GGML_ROPE_TYPE_NEOX,   128, 128, 8, 1, 1, 1e6f, 1,     0, 1,    false, true,  0,  32767,   {}},
    {"neox, in part",          GGML_ROPE_TYPE_NEOX,   80,  26,  3, 5, 1, 1e4f, 1,     0, 1,    false, false, 0,  9,       {}},
    {"neox, in part, place",   GGML_ROPE_TYPE_NEOX,   80,  32,  3, 5, 1, 1e4f, 1,     0, 1,    true,  true,  0,  9,       {}},
    {"neox, further on",       GGML_ROPE_TYPE_NEOX,   96,  32,  2, 3, 1, 1e4f, 1,     0, 1,    false, false, 64, 3,       {}},
    {"neox, YaRN",             GGML_ROPE_TYPE_NEOX,   64,  64,  2, 8, 1, 1e4f, 0.25f, 0.7f, 1, false, false, 0,  100000,  {}},
    {"neox, angles too large", GGML_ROPE_TYPE_NEOX,   64,  64,  2, 3, 1, 1e4f, 1,     0, 1,    false, false, 0,  2000000000, {}},
    {"neox, before the start", GGML_ROPE_TYPE_NEOX,   64,  64,  2, 9, 1, 1e4f, 1,     0, 1,    false, false, 0,  -5,      {}},
    {"mrope",                  GGML_ROPE_TYPE_MROPE,  128, 128, 4, 5, 1, 1e6f, 1,     0, 1,    false, false, 0,  50,      {16, 24, 24, 0}},
    {"mrope, in part",         GGML_ROPE_TYPE_MROPE,  128, 40,  4, 5, 1, 1e6f, 1,     0, 1,    false, true,  0,  50,      {4, 6, 6, 4}},
    {"imrope",                 GGML_ROPE_TYPE_IMROPE, 128, 128, 4, 5, 1, 5e6f, 1,     0, 1,    false, false, 0,  50,      {24, 20, 20, 0}},
    {"vision",                 GGML_ROPE_TYPE_VISION, 80,  40,  4, 5, 1, 1e4f, 1,     0, 1,    false, false, 0,  3,       {20, 20, 20, 20}},
};

static bool check_rope(const rope_case & c) {
    arena               a;
    ggml_tensor * const x = a.draw(c.width, c.n_heads, c.n_tokens, c.n_batch), * factors = nullptr;
    const int64_t       n_positions = c.n_tokens * (c.mode & GGML_ROPE_TYPE_MROPE ? 4 : 1);
    ggml_tensor * const positions   = ggml_new_tensor_1d(a.ctx, GGML_TYPE_I32, n_positions);
    for (int64_t i = 0; i < n_positions; i++) { ((int32_t *) positions->data)[i] = c.first + (int32_t) (i < c.n_tokens ? i : a.random() % 40); }
    if (c.has_factors) {
        factors = a.draw(c.n_dims / 2, 1, 1, 1, 0.2f, 2.0f);
    }
    int   sections[4];
    memcpy(sections, c.sections, sizeof(sections));
    const auto          multi  = c.in_place ? ggml_rope_multi_inplace : ggml_rope_multi;
    const auto          single = c.in_place ? ggml_rope_ext_inplace : ggml_rope_ext;
    ggml_tensor * const y      = c.mode & GGML_ROPE_TYPE_MROPE
        ? multi(a.ctx, x, positions, factors, c.n_dims, sections, c.mode, 4096, c.base, c.freq_scale, c.ext_factor, c.attn_factor, 32, 1)
        : single(a.ctx, x, positions, factors, c.n_dims, c.mode, 4096, c.base, c.freq_scale, c.ext_factor, c.attn_factor, 32, 1);
    ggml_set_op_params_i32(y, 15, c.offset);
    // One product is rounded less where it is fused: by a part of the larger of a pair.
    return is_same(BOTH(ggml_compute_forward_rope, y), x, 2e-7f, 1e-6f);
}

// Turned by the angle, (1, 0) becomes its cosine and sine: of angles of all sizes, to a little more than half a unit in the last place.
static bool check_angles(bool is_random) {
    const int64_t       n = 128, n_tokens = 4096;
    arena               a;
    ggml_tensor * const x         = a.draw(n, 1, n_tokens, 1);
    ggml_tensor * const positions = ggml_new_tensor_1d(a.ctx, GGML_TYPE_I32, n_tokens);
    for (int64_t i = 0; i < n_tokens; i++) {
        ((int32_t *) positions->data)[i] = is_random ? (int32_t) (a.random() >> 5) : (int32_t) i;
        for (int64_t j = 0; j < n; j++) { ((float *) x->data)[i * n + j] = j < n / 2 ? 1.0f : 0.0f; }
    }
    ggml_tensor * const      y     = ggml_rope(a.ctx, x, positions, n, GGML_ROPE_TYPE_NEOX);
    const std::vector<float> found = result_of(FORWARD(ggml_compute_forward_rope, y), y, x, 1);
    const float              scale = powf(10000.0f, -2.0f / n);
    int64_t                  n_bad = 0;
    for (int64_t i = 0; i < n_tokens; i++) {
        float angle = (float) ((int32_t *) positions->data)[i];
        for (int64_t j = 0; j < n / 2; j++) {
            const double c = std::cos((double) angle), s = std::sin((double) angle);
            const float  c_found = found[i * n + j], s_found = found[i * n + n / 2 + j];
            n_bad += !(std::fabs(c_found - c) <= 0.51 * (std::nextafter(std::fabs((float) c), 2.0f) - std::fabs((float) c)));
            n_bad += !(std::fabs(s_found - s) <= 0.51 * (std::nextafter(std::fabs((float) s), 2.0f) - std::fabs((float) s)));
            angle *= scale;
        }
    }
    return n_bad == 0;
}

// Floats of all kinds, those about which the functions change among them.
static std::vector<float> arguments(size_t n) {
    static const float EDGES[] = {0.0f, -0.0f, 10.0f, -10.0f, 9.9999f, -9.9999f, 10.001f, 65504.0f, -65504.0f, 65519.0f, 65520.0f, 1e6f, -1e6f, 1e-8f, -1e-8f,
                                  1e-30f, 3e38f, -3e38f, INFINITY, -INFINITY, NAN, 0.927734375f, 1.3120f, -1.3121f, 4.0f, -4.0f, 5.5f, -5.5f, 87.0f, -87.0f};
    std::vector<float>              x(n);
    std::mt19937                    random(5);
    std::normal_distribution<float> normal(0.0f, 2.5f);
    for (size_t i = 0; i < n; i++) { x[i] = i % 97 < 2 ? EDGES[i / 97 % (sizeof(EDGES) / sizeof(EDGES[0]))] : normal(random); }
    return x;
}

static bool has_same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    for (size_t i = 0; i < a.size(); i++) {
        const bool is_nan = std::isnan(a[i]) && std::isnan(b[i]);
        if (!is_nan && memcmp(&a[i], &b[i], sizeof(float))) { return false; }
    }
    return true;
}

static void check_gelu(report_function report) {
    for (int n : {1, 3, 4, 10, 97, 6007}) {
        const std::string        size = " of " + std::to_string(n) + " values, bit for bit upstream's";
        const std::vector<float> x    = arguments(n);
        std::vector<float>       g(n), found(n + 1), expected(n + 1);
        for (int i = 0; i < n; i++) { g[i] = 0.25f * (float) (i % 17) - 2.0f; }
        found[n] = expected[n] = 7.0f;  // nobody writes beyond the end
        pw_vec_gelu_f32(n, found.data(), x.data());
        ggml_vec_gelu_f32(n, expected.data(), x.data());
        report(has_same_bits(found, expected), "gelu" + size);
        pw_vec_geglu_f32(n, found.data(), x.data(), g.data());
        ggml_vec_geglu_f32(n, expected.data(), x.data(), g.data());
        report(has_same_bits(found, expected), "geglu" + size);
        pw_vec_gelu_quick_f32(n, found.data(), x.data());
        ggml_vec_gelu_quick_f32(n, expected.data(), x.data());
        report(has_same_bits(found, expected), "gelu_quick" + size);
        pw_vec_geglu_quick_f32(n, found.data(), x.data(), g.data());
        ggml_vec_geglu_quick_f32(n, expected.data(), x.data(), g.data());
        report(has_same_bits(found, expected), "geglu_quick" + size);
    }
    const int                n = 50000;
    const std::vector<float> x = arguments(n), g(n, -3.0f);
    std::vector<float>       found(n), gated(n);
    pw_vec_gelu_erf_f32(n, found.data(), x.data());
    pw_vec_geglu_erf_f32(n, gated.data(), x.data(), g.data());
    int n_bad = 0;
    for (int i = 0; i < n; i++) {
        const double expected = 0.5 * x[i] * (1.0 + std::erf(x[i] * (double) 0.70710678118654752440084436210484f));
        const double bound    = 2e-7 * std::fmax(std::fabs(x[i]), std::fabs(expected)) + 1e-38;  // 1 + erf cancels, as upstream's does
        const bool   is_nan   = std::isnan(x[i]) || x[i] == -INFINITY;
        n_bad += is_nan ? !std::isnan(found[i]) || !std::isnan(gated[i]) : x[i] == INFINITY ? found[i] != INFINITY : !(std::fabs(found[i] - expected) <= bound);
        n_bad += !is_nan && gated[i] != found[i] * g[i];
    }
    report(n_bad == 0, "gelu_erf and geglu_erf, against double precision");
}

// As ggml reads it, but for the sign of all where two values are the largest.
static bool check_q8_K() {
    std::mt19937                    random(3);
    std::normal_distribution<float> normal;
    std::vector<float>              x(QK_K * 4);
    std::vector<block_q8_K>         found(4), expected(4);
    for (int round = 0; round < 300; round++) {
        const float scale = std::exp2((float) (round % 40) - 20.0f);
        for (float & value : x) { value = round == 0 ? 0.0f : round % 3 == 1 ? scale * (float) ((int) (random() % 255) - 127) : scale * normal(random); }
        quantize_row_q8_K(x.data(), found.data(), (int64_t) x.size());
        quantize_row_q8_K_ref(x.data(), expected.data(), (int64_t) x.size());
        for (int i = 0; i < 4; i++) {
            const int sign = found[i].d == expected[i].d ? 1 : -1;
            bool      ok   = found[i].d == (float) sign * expected[i].d;
            for (int j = 0; j < QK_K; j++) { ok &= found[i].qs[j] == sign * expected[i].qs[j]; }
            for (int j = 0; j < QK_K / 16 && expected[i].d != 0.0f; j++) { ok &= found[i].bsums[j] == sign * expected[i].bsums[j]; }
            if (!ok) { return false; }
        }
    }
    return true;
}

static void check_all(report_function report) {
    check_norms(report);
    for (const rope_case & c : ROPES) {
        report(check_rope(c), std::string("rope: ") + c.name);
    }
    report(check_angles(false), "rope: sines and cosines of the first positions");
    report(check_angles(true), "rope: sines and cosines of large angles");
    check_gelu(report);
    report(check_q8_K(), "quantize_row_q8_K");
}

}  // namespace small_ops
