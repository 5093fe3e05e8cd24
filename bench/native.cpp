// One measurement of native llama.cpp; prints JSON. The same work in the same order as ours.py.
//
//   native MODEL N_THREADS

#include "ggml-cpu.h"
#include "llama.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double seconds(llama_context * ctx, int n_vocab, int chunk, int n_chunks) {
    llama_memory_clear(llama_get_memory(ctx), true);
    std::vector<llama_token> tokens(chunk);
    const double started = now();
    for (int first = 0; first < chunk * n_chunks; first += chunk) {
        for (int i = 0; i < chunk; i++) {
            tokens[i] = 100 + (long long) (first + i) * 7919 % (n_vocab - 100);
        }
        if (llama_decode(ctx, llama_batch_get_one(tokens.data(), chunk)) != 0) {
            std::fprintf(stderr, "bench native: llama_decode failed\n");
            std::exit(1);
        }
    }
    llama_synchronize(ctx);
    return now() - started;
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: native MODEL N_THREADS\n");
        return 2;
    }
    const int n_threads = std::atoi(argv[2]);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    const double started = now();
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        std::fprintf(stderr, "bench native: cannot load %s\n", argv[1]);
        return 1;
    }
    const double load_s = now() - started;

    llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.n_threads = params.n_threads_batch = n_threads;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        std::fprintf(stderr, "bench native: no context\n");
        return 1;
    }
    // A pool that lives as long as the context, as the sandboxed engine has.
    ggml_threadpool_params pool_params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool_t      pool        = ggml_threadpool_new(&pool_params);
    llama_attach_threadpool(ctx, pool, pool);

    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::printf("{\"load_s\": %g", load_s);
    for (int n : {128, 512}) {
        seconds(ctx, n_vocab, n, 1);
        std::printf(", \"pp%d\": %g", n, n / seconds(ctx, n_vocab, n, 1));
    }
    seconds(ctx, n_vocab, 1, 64);
    std::printf(", \"tg64\": %g}\n", 64 / seconds(ctx, n_vocab, 1, 64));

    llama_free(ctx);
    ggml_threadpool_free(pool);
    llama_model_free(model);
    return 0;
}
