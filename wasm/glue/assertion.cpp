// Failed assertions of ggml and llama.cpp: the end of the sandbox, but for those while a model is loaded or a context made.
//
// Both read what a model file says, and making a context builds the model's graph without computing it: what no architecture
// takes (heads of another size, matrices that do not fit) fails an assertion there. Both catch exceptions and throw away what is
// not finished, so such an assertion throws one, and its text becomes the reason. Only on the main thread: there is nobody to
// catch an exception of another one.
#include "pw.h"

#include "llama.h"

#include <stdexcept>

extern "C" char __stack_low, __stack_high;   // of the main thread, from the linker

static bool throws = false;

struct throwing_assertions {
    const bool before = throws;
    throwing_assertions() { throws = true; }
    ~throwing_assertions() { throws = before; }
};

static bool is_main_thread() {
    const char * here = static_cast<const char *>(__builtin_frame_address(0));
    return here >= &__stack_low && here <= &__stack_high;
}

extern "C" {
// ggml's abort callback: it does not come back.
void pw_assertion_failed(const char * text) {
    if (throws && is_main_thread()) {
        throw std::runtime_error(text);
    }
    pw_die(text);
}

// The linker (--wrap, module.cmake) calls these in the place of llama.cpp's.
llama_context * __real_llama_init_from_model(llama_model * model, llama_context_params params);
llama_model * __real_llama_model_load_from_file(const char * path, llama_model_params params);
llama_model * __real_llama_model_load_from_splits(const char ** paths, size_t n_paths, llama_model_params params);

llama_context * __wrap_llama_init_from_model(llama_model * model, llama_context_params params) {
    const throwing_assertions scope;
    return __real_llama_init_from_model(model, params);
}

llama_model * __wrap_llama_model_load_from_file(const char * path, llama_model_params params) {
    const throwing_assertions scope;
    return __real_llama_model_load_from_file(path, params);
}

llama_model * __wrap_llama_model_load_from_splits(const char ** paths, size_t n_paths, llama_model_params params) {
    const throwing_assertions scope;
    return __real_llama_model_load_from_splits(paths, n_paths, params);
}
}
