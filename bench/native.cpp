// Native llama.cpp doing what pyllama_wasm/measure.py does, in the same order; prints figures of the same names as JSON.
//
//   bench_native TASK MODEL N_THREADS CACHE_TYPE PREFILL DECODE DEPTHS SEQUENCES BEGAN
//
// TASK is speed, start, memory or embedding; PREFILL and DEPTHS are lists such as 128,512; BEGAN is the monotonic clock when
// the process was asked for.

#include "ggml-cpu.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

struct workload {
    const char *     model;
    int              n_threads;
    ggml_type        cache_type;
    std::vector<int> prefill;
    int              n_decode;
    std::vector<int> depths;
    int              n_sequences;
    double           began;
};

[[noreturn]] static void fail(const std::string & what) {
    std::fprintf(stderr, "bench native: %s\n", what.c_str());
    std::exit(1);
}

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Figures, in the order they were measured.
struct figures {
    std::string text;

    void add(const std::string & name, double value) {
        char number[40];
        std::snprintf(number, sizeof(number), "%.9g", value);
        text += (text.empty() ? "{\"" : ", \"") + name + "\": " + number;
    }
};

static std::vector<llama_token> arbitrary_tokens(int first, int n, int n_vocab) {
    const int                low = std::min(100, n_vocab / 2);
    std::vector<llama_token> tokens(n);
    for (int i = 0; i < n; i++) {
        tokens[i] = low + (long long) (first + i) * 7919 % (n_vocab - low);
    }
    return tokens;
}

// A model; freed with the process.
struct loaded {
    llama_model * model;
    int           n_vocab;

    explicit loaded(const workload & work) {
        model = llama_model_load_from_file(work.model, llama_model_default_params());
        if (!model) {
            fail(std::string("cannot load ") + work.model);
        }
        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    }
};

// A context with a thread pool that lives as long, as the sandboxed engine has; knows how many tokens it holds.
struct runner {
    llama_context *   ctx;
    ggml_threadpool_t pool;
    int               n_vocab, n = 0;

    runner(const loaded & from, const workload & work, int n_ctx, int n_sequences = 1, bool embeddings = false) : n_vocab(from.n_vocab) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = n_ctx;
        params.n_seq_max = n_sequences;
        params.n_threads = params.n_threads_batch = work.n_threads;
        params.type_k = params.type_v = work.cache_type;
        params.embeddings = embeddings;
        if (embeddings) {
            params.n_batch = params.n_ubatch = n_ctx;
        }
        ctx = llama_init_from_model(from.model, params);
        if (!ctx) {
            fail("no context");
        }
        ggml_threadpool_params pool_params = ggml_threadpool_params_default(work.n_threads);
        pool = ggml_threadpool_new(&pool_params);
        llama_attach_threadpool(ctx, pool, pool);
    }

    ~runner() {
        llama_free(ctx);
        ggml_threadpool_free(pool);
    }

    double decode(int count, int chunk) {
        std::vector<llama_token> tokens = arbitrary_tokens(n, count, n_vocab);
        const double began = now();
        for (int first = 0; first < count; first += chunk) {
            const int part = std::min(chunk, count - first);
            if (llama_decode(ctx, llama_batch_get_one(tokens.data() + first, part)) != 0) {
                fail("llama_decode failed");
            }
            llama_synchronize(ctx);
            n += part;
        }
        return now() - began;
    }

    void clear() {
        llama_memory_clear(llama_get_memory(ctx), true);
        n = 0;
    }

    double prefill(int count) {
        clear();
        return decode(count, std::min(count, 2048));
    }

    void fill(int depth) {
        if (n > depth) {
            clear();
        }
        while (n < depth) {
            decode(std::min(512, depth - n), 512);
        }
    }
};

static int context_size(const workload & work) {
    int needed = 40;
    for (int count : work.prefill) {
        needed = std::max(needed, count);
    }
    for (int depth : work.depths) {
        needed = std::max(needed, depth + work.n_decode + 1);
    }
    return (needed + 255) / 256 * 256;
}

static void add(llama_batch & batch, llama_token token, int pos, int sequence) {
    const int i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = pos;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequence;
    batch.logits[i] = 1;
}

static double sequences(runner & run, int n, int n_steps) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    double began = 0;
    for (int pos = 0; pos <= n_steps; pos++) {
        if (pos == 1) {
            began = now();
        }
        const std::vector<llama_token> tokens = arbitrary_tokens(pos * n, n, run.n_vocab);
        batch.n_tokens = 0;
        for (int i = 0; i < n; i++) {
            add(batch, tokens[i], pos, i);
        }
        if (llama_decode(run.ctx, batch) != 0) {
            fail("llama_decode of several sequences failed");
        }
        llama_synchronize(run.ctx);
    }
    llama_batch_free(batch);
    return n * n_steps / (now() - began);
}

// A prompt and the greedy choice of what follows.
static double first_token(runner & run, int first, int n) {
    run.clear();
    llama_sampler * greedy = llama_sampler_init_greedy();
    std::vector<llama_token> tokens = arbitrary_tokens(first, n, run.n_vocab);
    const double began = now();
    if (llama_decode(run.ctx, llama_batch_get_one(tokens.data(), n)) != 0) {
        fail("llama_decode of a prompt failed");
    }
    llama_sampler_sample(greedy, run.ctx, -1);
    const double took = now() - began;
    llama_sampler_free(greedy);
    return took;
}

static void measure_speed(workload work, figures & out) {
    loaded    model(work);
    const int n_train = llama_model_n_ctx_train(model.model);
    const auto too_long = [&](std::vector<int> & sizes, int more) {
        sizes.erase(std::remove_if(sizes.begin(), sizes.end(), [&](int size) { return size + more > n_train; }), sizes.end());
    };
    too_long(work.prefill, 0);
    too_long(work.depths, work.n_decode + 1);
    {
        runner run(model, work, context_size(work));
        run.fill(32);
        run.decode(8, 1);
        for (int n : work.prefill) {
            out.add("prefill_" + std::to_string(n), n / run.prefill(n));
        }
        for (int depth : work.depths) {
            run.fill(depth);
            run.decode(1, 1);
            out.add("decode_at_" + std::to_string(depth), work.n_decode / run.decode(work.n_decode, 1));
        }
    }
    if (work.n_sequences) {
        runner run(model, work, 256 * work.n_sequences, work.n_sequences);
        out.add("sequences_" + std::to_string(work.n_sequences), sequences(run, work.n_sequences, std::min(work.n_decode, 254)));
    }
    const int n = work.prefill.empty() ? 8 : work.prefill[0];
    runner    run(model, work, (n + 1 + 255) / 256 * 256);
    first_token(run, 0, n);
    out.add("first_token_s", first_token(run, n, n));
}

static void measure_start(const workload & work, figures & out) {
    loaded model(work);
    out.add("load_s", now() - work.began);
    runner run(model, work, 256);
    first_token(run, 0, 8);
    out.add("first_token_s", now() - work.began);
}

struct resident {
    double all = 0, own = 0;

    resident() {
        std::ifstream status("/proc/self/status");
        for (std::string line; std::getline(status, line);) {
            const double bytes = 1024.0 * std::atof(line.c_str() + line.find(':') + 1);
            if (line.rfind("VmRSS:", 0) == 0) {
                all = bytes;
            } else if (line.rfind("RssAnon:", 0) == 0 || line.rfind("RssShmem:", 0) == 0) {
                own += bytes;
            }
        }
    }
};

static void measure_memory(const workload & work, figures & out) {
    for (const char * name : {"first", "second"}) {
        const resident before;
        loaded *       model = new loaded(work);
        runner *       run   = new runner(*model, work, 1024);
        run->fill(128);
        run->decode(4, 1);
        const resident after;
        out.add(std::string(name) + "_bytes", after.all - before.all);
        out.add(std::string(name) + "_own_bytes", after.own - before.own);
    }
}

// 64 texts of 32 tokens, 16 texts in a batch.
static void measure_embedding(const workload & work, figures & out) {
    const int   n_texts = 64, n_tokens = 32, n_batch = 512, n_parallel = n_batch / n_tokens;
    loaded      model(work);
    runner      run(model, work, n_batch, n_parallel, true);
    llama_batch batch = llama_batch_init(n_batch, 0, 1);
    double      began = 0, sum = 0;
    for (int round = 0; round < 2; round++) {
        began = now();
        for (int first = 0; first < n_texts; first += n_parallel) {
            batch.n_tokens = 0;
            for (int text = 0; text < n_parallel; text++) {
                const std::vector<llama_token> tokens = arbitrary_tokens((first + text) * n_tokens, n_tokens, run.n_vocab);
                for (int i = 0; i < n_tokens; i++) {
                    add(batch, tokens[i], i, text);
                }
            }
            if (llama_encode(run.ctx, batch) != 0) {
                fail("llama_encode failed");
            }
            for (int text = 0; text < n_parallel; text++) {
                const float * vector = llama_get_embeddings_seq(run.ctx, text);
                if (!vector) {
                    fail("no embedding");
                }
                sum += vector[0];
            }
        }
    }
    const double took = now() - began;
    if (sum != sum) {
        fail("embeddings are not numbers");
    }
    llama_batch_free(batch);
    out.add("texts_per_s", n_texts / took);
}

static std::vector<int> numbers(const char * text) {
    std::vector<int>  found;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) {
        found.push_back(std::atoi(part.c_str()));
    }
    return found;
}

static ggml_type type_named(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && std::strcmp(known, name) == 0) {
            return (ggml_type) i;
        }
    }
    fail(std::string("unknown type ") + name);
}

int main(int argc, char ** argv) {
    if (argc != 10) {
        fail("usage: TASK MODEL N_THREADS CACHE_TYPE PREFILL DECODE DEPTHS SEQUENCES BEGAN");
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    const workload work = {argv[2],           std::atoi(argv[3]), type_named(argv[4]), numbers(argv[5]),
                           std::atoi(argv[6]), numbers(argv[7]),   std::atoi(argv[8]),  std::atof(argv[9])};
    const std::string task = argv[1];
    figures out;
    if (task == "speed") {
        measure_speed(work, out);
    } else if (task == "start") {
        measure_start(work, out);
    } else if (task == "memory") {
        measure_memory(work, out);
    } else if (task == "embedding") {
        measure_embedding(work, out);
    } else {
        fail("unknown task " + task);
    }
    std::printf("%s}\n", out.text.c_str());
    return 0;
}
