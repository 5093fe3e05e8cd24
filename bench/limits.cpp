// What this machine does at most: bytes read from memory per second, and 8-bit and f32 operations per second, with as many
// threads as asked for; prints JSON. Products count as two operations, as everywhere here.
//
//   bench_limits N_THREADS
//
// Reading is what decoding waits for, products are what prefill consists of. Both loops have nothing else to do, so no engine
// reaches them; how near it comes is what the report tells.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

static constexpr size_t BUFFER_BYTES = size_t(512) << 20;  // several times the caches
static constexpr int    N_CHAINS = 12;                     // independent sums: latency times throughput of every processor
static constexpr int    N_STEPS = 2000000;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static volatile uint64_t sink;

// One vector of codes or floats, and its two products; BYTES and FLOATS are products per instruction.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
static constexpr int BYTES = 64, FLOATS = 16;
typedef __m512i ints;
typedef __m512 floats;
static inline ints dot(ints sum, ints a, ints b) { return _mm512_dpbusd_epi32(sum, a, b); }
static inline floats madd(floats sum, floats a, floats b) { return _mm512_fmadd_ps(a, b, sum); }
static inline ints load(const uint64_t * p) { return _mm512_loadu_si512(p); }
static inline ints merge(ints a, ints b) { return _mm512_xor_si512(a, b); }
#elif defined(__AVX2__) && defined(__FMA__)
static constexpr int BYTES = 32, FLOATS = 8;
typedef __m256i ints;
typedef __m256 floats;
static inline ints dot(ints sum, ints a, ints b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
static inline floats madd(floats sum, floats a, floats b) { return _mm256_fmadd_ps(a, b, sum); }
static inline ints load(const uint64_t * p) { return _mm256_loadu_si256((const __m256i *) p); }
static inline ints merge(ints a, ints b) { return _mm256_xor_si256(a, b); }
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
static constexpr int BYTES = 16, FLOATS = 4;
typedef int32x4_t ints;
typedef float32x4_t floats;
static inline ints dot(ints sum, ints a, ints b) { return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
static inline floats madd(floats sum, floats a, floats b) { return vfmaq_f32(sum, a, b); }
static inline ints load(const uint64_t * p) { return vld1q_s32((const int32_t *) p); }
static inline ints merge(ints a, ints b) { return veorq_s32(a, b); }
#else
static constexpr int BYTES = 16, FLOATS = 4;
typedef int32_t ints __attribute__((vector_size(16)));
typedef float floats __attribute__((vector_size(16)));
typedef int8_t codes __attribute__((vector_size(16)));
static inline ints dot(ints sum, ints a, ints b) {
    for (int i = 0; i < 16; i++) {
        sum[i / 4] += ((codes) a)[i] * ((codes) b)[i];
    }
    return sum;
}
static inline floats madd(floats sum, floats a, floats b) { return sum + a * b; }
static inline ints load(const uint64_t * p) { return *(const ints *) p; }
static inline ints merge(ints a, ints b) { return a ^ b; }
#endif

// Keeps a value in a register and the compiler from knowing it.
#define HIDE(x) asm volatile("" : "+" REGISTER(x))
#if defined(__x86_64__)
#define REGISTER "v"
#elif defined(__aarch64__)
#define REGISTER "w"
#else
#define REGISTER "m"
#endif

static void read_all(const uint64_t * from, size_t n_words) {
    constexpr size_t step = sizeof(ints) / 8;
    ints sums[4];
    for (ints & sum : sums) {
        sum = load(from);
    }
    for (size_t i = 0; i + 4 * step <= n_words; i += 4 * step) {
        for (size_t j = 0; j < 4; j++) {
            sums[j] = merge(sums[j], load(from + i + j * step));
        }
    }
    const ints all = merge(merge(sums[0], sums[1]), merge(sums[2], sums[3]));
    uint64_t word;
    std::memcpy(&word, &all, sizeof(word));
    sink = word;
}

template <typename T, T (*product)(T, T, T)> static void multiply() {
    T sums[N_CHAINS] = {}, a = {}, b = {};
    HIDE(a);
    HIDE(b);
    for (int step = 0; step < N_STEPS; step++) {
        for (T & sum : sums) {
            sum = product(sum, a, b);
            HIDE(sum);
        }
    }
    for (T & sum : sums) {
        HIDE(sum);
    }
}

// The best of several passes of all threads together.
static double best_s(int n_threads, const std::function<void(int)> & work) {
    double best = 1e30;
    for (int pass = 0; pass < 7; pass++) {
        const double began = now();
        std::vector<std::thread> threads;
        for (int i = 0; i < n_threads; i++) {
            threads.emplace_back(work, i);
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        best = std::min(best, now() - began);
    }
    return best;
}

int main(int argc, char ** argv) {
    const int n_threads = argc == 2 ? std::atoi(argv[1]) : 0;
    if (n_threads < 1 || n_threads > 1024) {
        std::fprintf(stderr, "usage: bench_limits N_THREADS\n");
        return 2;
    }
    std::vector<uint64_t> buffer(BUFFER_BYTES / 8, 1);
    const size_t part = buffer.size() / n_threads / 32 * 32;
    const double read_s = best_s(n_threads, [&](int i) { read_all(buffer.data() + i * part, part); });
    const double dot_s = best_s(n_threads, [](int) { multiply<ints, dot>(); });
    const double madd_s = best_s(n_threads, [](int) { multiply<floats, madd>(); });
    const double products = double(n_threads) * N_CHAINS * N_STEPS;
    std::printf("{\"n_threads\": %d, \"read_bytes_per_s\": %.6g, \"int8_ops_per_s\": %.6g, \"f32_ops_per_s\": %.6g}\n",
                n_threads, 8.0 * part * n_threads / read_s, 2 * BYTES * products / dot_s, 2 * FLOATS * products / madd_s);
    return 0;
}
