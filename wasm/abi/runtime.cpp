// The parts of the call boundary that do not depend on llama.cpp's headers.

#include "thunk.h"

#include <exception>
#include <new>
#include <stdexcept>

extern "C" __attribute__((used, visibility("default"))) pw_error_t pw_error = {};

// Where pw_error lies, for hosts that read functions more easily than globals.
PW_EXPORT("pw_error_address") pw_error_t * pw_error_address() {
    return &pw_error;
}

extern "C" __attribute__((import_module("host"), import_name("callback")))
int32_t pw_host_callback(int32_t kind, int32_t id, uint64_t * slots);

static void record(pw_error_code code, const char * text) {
    std::strncpy(pw_error.text, text, sizeof pw_error.text - 1);
    pw_error.text[sizeof pw_error.text - 1] = '\0';
    pw_error.code = code;
}

__attribute__((noinline)) void pw_catch() {
    try {
        throw;
    } catch (const std::bad_alloc & error) {
        record(PW_ERROR_OUT_OF_MEMORY, error.what());
    } catch (const std::length_error & error) {
        record(PW_ERROR_OUT_OF_MEMORY, error.what());
    } catch (const std::exception & error) {
        record(PW_ERROR_EXCEPTION, error.what());
    } catch (...) {
        record(PW_ERROR_UNKNOWN, "an exception of unknown type");
    }
}

__attribute__((noinline)) void pw_callback(int32_t kind, int32_t id, uint64_t * slots) {
    if (pw_host_callback(kind, id, slots) != 0) {
        pw_stop = 1;
        __builtin_trap();
    }
}
