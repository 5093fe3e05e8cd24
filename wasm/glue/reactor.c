// The module's start: constructors, then ggml's log and abort text to the host.
#include "ggml.h"
#include "llama.h"
#include "pw.h"

#include <string.h>

extern void __wasm_call_ctors(void);
extern void pw_assertion_failed(const char * text);

static void on_log(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    pw_host_log(level, text, strlen(text));
}

PW_EXPORTED(_initialize) void _initialize(void) {
    __wasm_call_ctors();
    ggml_set_abort_callback(pw_assertion_failed);   // GGML_ASSERT and GGML_ABORT: their text becomes the exception's
    llama_log_set(on_log, NULL);
    llama_backend_init();
}
