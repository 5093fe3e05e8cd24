// Feeds one hostile input to native llama.cpp, with the steps that tests/security/corpus takes in the sandbox.
//
//   native_corpus model    MODEL                    load, tokenize, decode, choose tokens
//   native_corpus adapter  MODEL ADAPTER...         the same with LoRA adapters
//   native_corpus state    MODEL SESSION            load a session file, then decode
//   native_corpus grammar  MODEL GRAMMAR            choose tokens under a GBNF grammar
//   native_corpus accept   MODEL GRAMMAR            accept a token under a GBNF grammar
//   native_corpus trigger  MODEL GRAMMAR PATTERN    the same under a lazy grammar
//   native_corpus template TEMPLATE                 render a chat template
//   native_corpus json     TEXT                     parse JSON and write it again
//   native_corpus prompt   MODEL TEXT               tokenize
//   native_corpus context  MODEL N_CTX              create a context
//   native_corpus long     MODEL N                  decode N tokens into a context of 64
//   native_corpus positions MODEL                   move and remove what is not there
//
// Inputs are files. Exit status 0: accepted; 3: refused. No exception is caught that crosses llama.h: a binding through
// C would not outlive it either. Those of the template engine and of the JSON parser are, as llama.cpp's server does.

#include "llama-cpp.h"
#include "llama.h"

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

static constexpr int N_TOKENS = 4;

[[noreturn]] static void refuse(const char * what) {
    printf("refused: %s\n", what);
    fflush(stdout);
    _Exit(3);
}

static std::string slurp(const char * path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

static llama_model_ptr load(const char * path) {
    llama_model_ptr model(llama_model_load_from_file(path, llama_model_default_params()));
    if (!model) {
        refuse("llama_model_load_from_file");
    }
    return model;
}

static llama_context_ptr open(llama_model * model, uint32_t n_ctx) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = 64;
    params.n_ubatch        = 64;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    llama_context_ptr ctx(llama_init_from_model(model, params));
    if (!ctx) {
        refuse("llama_init_from_model");
    }
    return ctx;
}

static std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::string & text) {
    const int n = -llama_tokenize(vocab, text.data(), (int32_t) text.size(), nullptr, 0, true, true);
    std::vector<llama_token> tokens(n > 0 ? n : 0);
    const int found = llama_tokenize(vocab, text.data(), (int32_t) text.size(), tokens.data(), (int32_t) tokens.size(), true, true);
    if (found < 0) {
        refuse("llama_tokenize");
    }
    return tokens;
}

static void decode(llama_context * ctx, std::vector<llama_token> tokens) {
    if (const int status = llama_decode(ctx, llama_batch_get_one(tokens.data(), (int32_t) tokens.size()))) {
        refuse(("llama_decode: " + std::to_string(status)).c_str());
    }
}

// Goes on by some tokens, chosen by `first` (which may be null) and then as the likeliest.
static void generate(llama_context * ctx, const llama_vocab * vocab, llama_sampler * first, const std::string & prompt) {
    llama_sampler_ptr chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    if (first) {
        llama_sampler_chain_add(chain.get(), first);
    }
    llama_sampler_chain_add(chain.get(), llama_sampler_init_greedy());
    const llama_model * model = llama_get_model(ctx);
    if (llama_model_has_encoder(model)) {
        std::vector<llama_token> tokens = tokenize(vocab, prompt);
        if (const int status = llama_encode(ctx, llama_batch_get_one(tokens.data(), (int32_t) tokens.size()))) {
            refuse(("llama_encode: " + std::to_string(status)).c_str());
        }
        decode(ctx, {llama_model_decoder_start_token(model)});
    } else {
        decode(ctx, tokenize(vocab, prompt));
    }
    for (int i = 0; i < N_TOKENS; i++) {
        const llama_token token = llama_sampler_sample(chain.get(), ctx, -1);
        char piece[256];
        llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, true);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        decode(ctx, {token});
    }
}

static void run_adapter(char ** paths, int n) {
    llama_model_ptr model = load(paths[0]);
    llama_context_ptr ctx = open(model.get(), 64);
    std::vector<llama_adapter_lora *> adapters;
    for (int i = 1; i < n; i++) {
        adapters.push_back(llama_adapter_lora_init(model.get(), paths[i]));
        if (!adapters.back()) {
            refuse("llama_adapter_lora_init");
        }
    }
    std::vector<float> scales(adapters.size(), 1.0f);
    llama_set_adapters_lora(ctx.get(), adapters.data(), adapters.size(), scales.data());
    generate(ctx.get(), llama_model_get_vocab(model.get()), nullptr, "ab");
}

static void run_state(const char * model_path, const char * session) {
    llama_model_ptr model = load(model_path);
    llama_context_ptr ctx = open(model.get(), 256);
    std::vector<llama_token> tokens(256);
    size_t n = 0;
    if (!llama_state_load_file(ctx.get(), session, tokens.data(), tokens.size(), &n)) {
        refuse("llama_state_load_file");
    }
    decode(ctx.get(), {20, 21});
}

static void run_grammar(const char * model_path, const std::string & grammar, const char * pattern) {
    llama_model_ptr model = load(model_path);
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    llama_sampler * sampler = pattern
        ? llama_sampler_init_grammar_lazy_patterns(vocab, grammar.c_str(), "root", &pattern, 1, nullptr, 0)
        : llama_sampler_init_grammar(vocab, grammar.c_str(), "root");
    if (!sampler) {
        refuse("llama_sampler_init_grammar");
    }
    generate(open(model.get(), 64).get(), vocab, sampler, "ab");
}

static void run_accept(const char * model_path, const std::string & grammar) {
    llama_model_ptr model = load(model_path);
    llama_sampler_ptr sampler(llama_sampler_init_grammar(llama_model_get_vocab(model.get()), grammar.c_str(), "root"));
    if (!sampler) {
        refuse("llama_sampler_init_grammar");
    }
    llama_sampler_accept(sampler.get(), 5);
}

static void run_template(const std::string & text) {
    try {
        jinja::lexer lexer;
        auto tokens = lexer.tokenize(text);
        jinja::program program = jinja::parse_from_tokens(tokens);
        jinja::context ctx(text);
        common_json message{{"role", "user"}, {"content", "Hi"}};
        common_json messages = common_json::array();
        messages.push_back(message);
        jinja::global_from_json(ctx, common_json{{"messages", messages}, {"add_generation_prompt", true}}, true);
        jinja::runtime runtime(ctx);
        const jinja::value results = runtime.execute(program);
        printf("rendered %zu bytes\n", runtime.gather_string_parts(results)->as_string().str().size());
    } catch (const std::exception & error) {
        refuse(error.what());
    }
}

static void run_json(const std::string & text) {
    try {
        const std::string again = common_json::parse(text).dump();
        printf("wrote %zu bytes\n", again.size());
    } catch (const std::exception & error) {
        refuse(error.what());
    }
}

static void run_long(const char * model_path, int n) {
    llama_model_ptr model = load(model_path);
    llama_context_ptr ctx = open(model.get(), 64);
    for (int i = 0; i < n; i += 32) {
        decode(ctx.get(), std::vector<llama_token>(32, 5));
    }
}

static void run_positions(const char * model_path) {
    llama_model_ptr model = load(model_path);
    llama_context_ptr ctx = open(model.get(), 64);
    decode(ctx.get(), {5, 6, 7, 8});
    llama_memory_t memory = llama_get_memory(ctx.get());
    llama_memory_seq_rm(memory, 0, 3, -1000000);
    llama_memory_seq_add(memory, 0, 1, -1, -1000000);
    llama_memory_seq_cp(memory, 0, 0, 5, 2);
    decode(ctx.get(), {9});
}

static int run(const std::string & action, char ** args, int n) {
    if (action == "model" && n == 1) {
        llama_model_ptr model = load(args[0]);
        generate(open(model.get(), 64).get(), llama_model_get_vocab(model.get()), nullptr, "ab");
    } else if (action == "adapter" && n >= 2) {
        run_adapter(args, n);
    } else if (action == "state" && n == 2) {
        run_state(args[0], args[1]);
    } else if (action == "grammar" && n == 2) {
        run_grammar(args[0], slurp(args[1]), nullptr);
    } else if (action == "accept" && n == 2) {
        run_accept(args[0], slurp(args[1]));
    } else if (action == "trigger" && n == 3) {
        run_grammar(args[0], slurp(args[1]), slurp(args[2]).c_str());
    } else if (action == "template" && n == 1) {
        run_template(slurp(args[0]));
    } else if (action == "json" && n == 1) {
        run_json(slurp(args[0]));
    } else if (action == "prompt" && n == 2) {
        llama_model_ptr model = load(args[0]);
        printf("%zu tokens\n", tokenize(llama_model_get_vocab(model.get()), slurp(args[1])).size());
    } else if (action == "context" && n == 2) {
        llama_model_ptr model = load(args[0]);
        generate(open(model.get(), (uint32_t) strtoul(args[1], nullptr, 10)).get(), llama_model_get_vocab(model.get()), nullptr, "ab");
    } else if (action == "long" && n == 2) {
        run_long(args[0], atoi(args[1]));
    } else if (action == "positions" && n == 1) {
        run_positions(args[0]);
    } else {
        fprintf(stderr, "usage: native_corpus ACTION FILE...\n");
        return 2;
    }
    printf("accepted\n");
    return 0;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: native_corpus ACTION FILE...\n");
        return 2;
    }
    llama_backend_init();
    return run(argv[1], argv + 2, argc - 2);
}
