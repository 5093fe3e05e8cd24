// Checks of flash attention against double precision: one, two and four threads, which must give the same bits.
#pragma once

#include "ggml-cpu.h"
#include "ggml.h"
#include "../kernels/blas.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace attention {

enum masking {
    NONE,
    CAUSAL,     // and the newest key hidden too
    HOLES,      // keys hidden at random, some rows altogether
    WINDOW,     // causal, and what is older than 70 keys
    SEQUENCES,  // three that lie one behind another, causal each
};

struct attention_case {
    const char * name;
    ggml_type    type;
    int64_t      dk, dv, n_tokens, n_kv, n_head, n_head_kv, n_batch;
    masking      mask;
    bool         has_sinks;
    float        max_bias, softcap;
    bool         is_blas = false;  // products by the host
};

static float slope_of(const attention_case & c, int64_t head) {
    if (c.max_bias <= 0.0f) {
        return 1.0f;
    }
    const int n = 1 << (int) std::floor(std::log2((float) c.n_head));
    return head < n ? std::pow(std::pow(2.0f, -c.max_bias / n), (float) head + 1)
                    : std::pow(std::pow(2.0f, -c.max_bias / 2 / n), (float) (2 * (head - n) + 1));
}

// Softmax attention in double precision over the same cache values; the largest difference.
static double attention_error(const attention_case & c, const float * q, const float * k, const float * v, const float * mask,
                              const float * sinks, float scale, const float * out) {
    double worst = 0.0;
    for (int64_t b = 0; b < c.n_batch; b++) for (int64_t h = 0; h < c.n_head; h++) for (int64_t t = 0; t < c.n_tokens; t++) {
        const int64_t       kv = b * c.n_head_kv + h / (c.n_head / c.n_head_kv);
        const float *       query = q + ((b * c.n_head + h) * c.n_tokens + t) * c.dk;
        std::vector<double> weight(c.n_kv);
        double              largest = c.has_sinks ? sinks[h] : -INFINITY;
        for (int64_t i = 0; i < c.n_kv; i++) {
            double score = 0.0;
            for (int64_t d = 0; d < c.dk; d++) {
                score += (double) query[d] * k[(kv * c.n_kv + i) * c.dk + d];
            }
            score *= scale;
            if (c.softcap != 0.0f) {
                score = c.softcap * std::tanh(score / c.softcap);
            }
            weight[i] = score + (c.mask ? slope_of(c, h) * mask[t * c.n_kv + i] : 0.0f);
            largest   = std::fmax(largest, weight[i]);
        }
        double sum = c.has_sinks ? std::exp(sinks[h] - largest) : 0.0;
        for (double & value : weight) {
            value = largest == -INFINITY ? 0.0 : std::exp(value - largest);
            sum += value;
        }
        sum = sum == 0.0 ? 1.0 : sum;  // where nothing is visible the output is zero
        for (int64_t d = 0; d < c.dv; d++) {
            double expected = 0.0;
            for (int64_t i = 0; i < c.n_kv; i++) {
                expected += weight[i] / sum * v[(kv * c.n_kv + i) * c.dv + d];
            }
            const double error = std::fabs(out[((b * c.n_tokens + t) * c.n_head + h) * c.dv + d] - expected);
            worst              = error <= worst ? worst : error;
        }
    }
    return worst;
}

// Fill a cache tensor; return what its values read as.
static std::vector<float> fill_cache(ggml_tensor * t, std::mt19937 & random) {
    std::normal_distribution<float> normal;
    std::vector<float>              values(ggml_nelements(t)), read(values.size());
    for (float & value : values) { value = normal(random); }
    const int64_t n_rows = ggml_nrows(t);
    ggml_quantize_chunk(t->type, values.data(), t->data, 0, n_rows, t->ne[0], nullptr);
    if (t->type == GGML_TYPE_F32) {
        return values;
    }
    for (int64_t i = 0; i < n_rows; i++) {
        ggml_get_type_traits(t->type)->to_float((const char *) t->data + i * t->nb[1], read.data() + i * t->ne[0], t->ne[0]);
    }
    return read;
}

// Queries as native rounds them for keys of this type.
static std::vector<float> rounded(std::vector<float> q, const attention_case & c) {
    if (c.type == GGML_TYPE_F32 || (c.n_tokens >= 64 && c.type == GGML_TYPE_F16)) {
        return q;
    }
    std::vector<uint8_t> buffer(ggml_row_size(c.type, c.dk));
    for (size_t i = 0; i < q.size(); i += c.dk) {
        ggml_get_type_traits_cpu(c.type)->from_float(q.data() + i, buffer.data(), c.dk);
        ggml_get_type_traits(c.type)->to_float(buffer.data(), q.data() + i, c.dk);
    }
    return q;
}

static bool is_hidden(const attention_case & c, int64_t token, int64_t key, std::mt19937 & random) {
    const int64_t age = c.n_kv - c.n_tokens + token - key;  // at least 1 for those that a causal mask shows
    switch (c.mask) {
        case HOLES: return random() % 3 == 0 || token % 9 == 4;
        case WINDOW: return age < 1 || age > 70;
        case SEQUENCES: {
            const int64_t of_token = 3 * token / c.n_tokens, of_key = 3 * key / c.n_kv;
            return of_key != of_token || key - of_key * c.n_kv / 3 > token - of_token * c.n_tokens / 3 + 3;
        }
        default: return age < 1;
    }
}

static bool check_attention(const attention_case & c, int n_threads) {
    ggml_init_params init = {64u << 20, nullptr, false};
    ggml_context *   ctx  = ggml_init(init);
    std::mt19937     random(11);
    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.dk, c.n_tokens, c.n_head, c.n_batch);
    ggml_tensor * k = ggml_new_tensor_4d(ctx, c.type, c.dk, c.n_kv, c.n_head_kv, c.n_batch);
    ggml_tensor * v = ggml_new_tensor_4d(ctx, c.type, c.dv, c.n_kv, c.n_head_kv, c.n_batch);
    const std::vector<float> q_values = rounded(fill_cache(q, random), c), k_values = fill_cache(k, random), v_values = fill_cache(v, random);
    std::vector<float> mask(c.n_tokens * c.n_kv, 0.0f), sinks(c.n_head);
    ggml_tensor * m = nullptr;
    if (c.mask) {
        m = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, c.n_kv, c.n_tokens);
        for (int64_t t = 0; t < c.n_tokens; t++) for (int64_t i = 0; i < c.n_kv; i++) {
            ggml_fp16_t & half = ((ggml_fp16_t *) m->data)[t * c.n_kv + i];
            half = ggml_fp32_to_fp16(is_hidden(c, t, i, random) ? -INFINITY : c.max_bias > 0 ? -(float) (c.n_kv - i) / 64 : 0.0f);
            mask[t * c.n_kv + i] = ggml_fp16_to_fp32(half);
        }
    }
    const float   scale = 1.0f / std::sqrt((float) c.dk);
    ggml_tensor * out   = ggml_flash_attn_ext(ctx, q, k, v, m, scale, c.max_bias, c.softcap);
    if (c.has_sinks) {
        ggml_tensor * s = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_head);
        for (int64_t h = 0; h < c.n_head; h++) {
            ((float *) s->data)[h] = sinks[h] = 0.3f * (float) h - 1.0f;
        }
        ggml_flash_attn_ext_add_sinks(out, s);
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    pw_set_blas(c.is_blas);
    ggml_graph_compute_with_ctx(ctx, graph, n_threads);
    pw_set_blas(0);
    const float * const result = (const float *) out->data;
    const double        error  = attention_error(c, q_values.data(), k_values.data(), v_values.data(), mask.data(), sinks.data(), scale, result);
    static std::vector<float> of_one_thread;  // of this case: bit for bit what more threads must give
    if (n_threads == 1) {
        of_one_thread.assign(result, result + ggml_nelements(out));
    }
    const bool is_same = memcmp(of_one_thread.data(), result, ggml_nbytes(out)) == 0;
    ggml_free(ctx);
    const double bound = c.dk % 4 == 0 ? 2e-5 : 2e-3;  // upstream's adds halves up in half precision
    return error < bound && is_same;
}

static const attention_case CASES[] = {
    {"decode, three heads on one",     GGML_TYPE_F16,  64,  64,   1,  300, 9, 3, 1, CAUSAL,  false, 0, 0},
    {"decode, f32",                    GGML_TYPE_F32,  64,  64,   1,  512, 4, 4, 1, CAUSAL,  false, 0, 0},
    {"decode, q8_0",                   GGML_TYPE_Q8_0, 64,  64,   1,  256, 8, 2, 1, CAUSAL,  false, 0, 0},
    {"decode, one key",                GGML_TYPE_F16,  64,  64,   1,    2, 4, 2, 1, CAUSAL,  false, 0, 0},
    {"two sequences",                  GGML_TYPE_F16,  64,  64,   1,  130, 6, 2, 2, CAUSAL,  false, 0, 0},
    {"prefill",                        GGML_TYPE_F16,  64,  64,  70,  128, 9, 3, 1, CAUSAL,  false, 0, 0},
    {"prefill, odd widths",            GGML_TYPE_F16,  40,  20,  17,   77, 3, 1, 1, CAUSAL,  false, 0, 0},
    {"different widths of K and V",    GGML_TYPE_F16, 192, 128,   5,   96, 4, 1, 1, CAUSAL,  false, 0, 0},
    {"no mask",                        GGML_TYPE_F16,  64,  64,   7,   65, 2, 2, 1, NONE, false, 0, 0},
    {"ALiBi",                          GGML_TYPE_F16,  32,  32,   3,   90, 6, 6, 1, CAUSAL,  false, 8, 0},
    {"capped scores",                  GGML_TYPE_F16, 128, 128,   2,  100, 4, 2, 1, CAUSAL,  false, 0, 5},
    {"prefill, q8_0",                  GGML_TYPE_Q8_0, 64,  64,  66,  100, 4, 2, 1, CAUSAL,  false, 0, 0},
    {"sinks",                          GGML_TYPE_F16,  64,  64,   1,  200, 8, 2, 1, CAUSAL,  true,  0, 0},
    {"sinks, prefill",                 GGML_TYPE_F16,  64,  64,  33,   64, 8, 2, 1, CAUSAL,  true,  0, 0},
    {"decode, a KV head each",         GGML_TYPE_F16,  64,  64,   1,  141, 5, 5, 1, CAUSAL,  false, 0, 0},
    {"decode, two heads on one",       GGML_TYPE_F16,  80,  80,   1,  263, 6, 3, 1, CAUSAL,  false, 0, 0},
    {"decode, four heads on one",      GGML_TYPE_F16, 128, 128,   1,  300, 8, 2, 1, CAUSAL,  false, 0, 0},
    {"decode, seven heads on one",     GGML_TYPE_F16,  64,  64,   1,  270, 14, 2, 1, CAUSAL, false, 0, 0},
    {"decode, no mask, K wider",       GGML_TYPE_F16, 192, 128,   1,  135, 4, 2, 1, NONE, false, 0, 0},
    {"four tokens",                    GGML_TYPE_F16,  64,  64,   4,  260, 6, 3, 1, CAUSAL,  false, 0, 0},
    {"decode, heads in two groups",    GGML_TYPE_F16,  32,  32,   1,  150, 40, 40, 2, CAUSAL, true, 8, 0},
    {"decode, results in rounds",      GGML_TYPE_F16,  64,  64,   1,  900, 64, 16, 1, CAUSAL, false, 0, 0},
    {"eight sequences",                GGML_TYPE_F16,  64,  64,   1,  300, 9, 3, 8, CAUSAL,  false, 0, 0},
    {"more rows than a tile, decode",  GGML_TYPE_F16,  64,  64,   1,   80, 64, 1, 1, CAUSAL,  false, 0, 0},
    {"decode, very many heads",        GGML_TYPE_F16, 128, 128,   1,  700, 128, 128, 1, CAUSAL, false, 0, 0},
    {"decode, widths left to upstream", GGML_TYPE_F16, 70,  70,   1,  600, 4, 2, 1, CAUSAL,  false, 0, 0},
    // products by the host (flash_blas.c): blocks of 64 to 192 rows, chunks of 512 keys
    {"BLAS, prefill",                  GGML_TYPE_F16,  64,  64, 130,  256, 9, 3, 1, CAUSAL, false, 0, 0, true},
    {"BLAS, several chunks",           GGML_TYPE_F16,  64,  64,  70, 1115, 6, 2, 1, CAUSAL, false, 0, 0, true},
    {"BLAS, runs of blocks",           GGML_TYPE_F16,  32,  32, 600,  600, 2, 2, 1, CAUSAL, false, 0, 0, true},
    {"BLAS, no mask, odd widths",      GGML_TYPE_F16,  40,  36,  90,  613, 3, 1, 1, NONE,   false, 0, 0, true},
    {"BLAS, holes",                    GGML_TYPE_F16,  64,  64,  80,  601, 4, 2, 1, HOLES,  false, 0, 0, true},
    {"BLAS, window",                   GGML_TYPE_F16,  64,  64, 150, 1100, 4, 2, 1, WINDOW, false, 0, 0, true},
    {"BLAS, sequences in one cache",   GGML_TYPE_F16,  64,  64,  96,  900, 4, 2, 1, SEQUENCES, true, 0, 0, true},
    {"BLAS, sequences of their own",   GGML_TYPE_F16,  64,  64,  60,  300, 6, 2, 3, CAUSAL, false, 0, 0, true},
    {"BLAS, ALiBi and sinks",          GGML_TYPE_F16,  32,  32, 100,  800, 6, 6, 1, CAUSAL, true,  8, 0, true},
    {"BLAS, ALiBi, holes",             GGML_TYPE_F16,  64,  64, 100,  520, 6, 2, 1, HOLES,  false, 8, 0, true},
    {"BLAS, capped scores",            GGML_TYPE_F16, 128, 128,  70,  530, 4, 2, 1, CAUSAL, false, 0, 5, true},
    {"BLAS, q8_0",                     GGML_TYPE_Q8_0, 64,  64,  66,  600, 8, 2, 1, CAUSAL, false, 0, 0, true},
    {"BLAS, f32",                      GGML_TYPE_F32,  64,  64,  66,  590, 4, 4, 1, CAUSAL, false, 0, 0, true},
    {"BLAS, different widths",         GGML_TYPE_F16, 192, 128,  40,  540, 8, 2, 1, CAUSAL, false, 0, 0, true},
    {"BLAS, one token of many heads",  GGML_TYPE_F16, 576, 512,   2,  600, 200, 1, 1, CAUSAL, false, 0, 0, true},
};

static void check_all(void (*report)(bool, const std::string &)) {
    for (const attention_case & c : CASES) {
        for (int n_threads : {1, 2, 4}) {
            report(check_attention(c, n_threads), std::string("attention: ") + c.name + ", threads " + std::to_string(n_threads));
        }
    }
}

}  // namespace attention
