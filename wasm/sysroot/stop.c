// Safepoints, the stop flag, and every way to end: abort, assert, exit.
#include "pw.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((used, visibility("default"))) volatile int32_t pw_stop;
__attribute__((used, visibility("default"))) volatile int32_t pw_cancel;

static _Thread_local int spins;  // of the wait that is going on; 0: none is

// The first thread that notices wakes those that sleep, which would notice only at the end of their slice.
static __attribute__((noinline, cold, noreturn)) void end(void) {
    pw_wake_all();
    __builtin_trap();
}

// clang calls this on every edge of control code and on every function entry of ggml (-fsanitize-coverage=trace-pc).
__attribute__((used)) void __sanitizer_cov_trace_pc(void) {
    if (__builtin_expect(pw_stop, 0)) {
        end();
    }
    spins = 0;
}

void pw_safepoint(void) {
    if (__builtin_expect(pw_stop, 0)) {
        end();
    }
}

__attribute__((noreturn)) void pw_die(const char * text) {
    // The text goes first: the flag may end this thread at any later safepoint.
    pw_host_abort(text, strlen(text));
    pw_stop = 1;
    end();
}

static bool pw_answer_cancel(void * data) {
    (void) data;
    return pw_cancel != 0;
}

// The table index of a ggml_abort_callback that needs no host call, so that it may be asked at every graph node.
PW_EXPORTED(pw_abort_callback) void * pw_abort_callback(void) {
    return (void *) pw_answer_cancel;
}

__attribute__((noreturn)) void abort(void) {
    pw_die("abort() was called");
}

#ifndef PW_COMMAND
__attribute__((noreturn)) void _Exit(int status) {
    char text[48];
    snprintf(text, sizeof text, "exit(%d) was called", status);
    pw_die(text);
}
#endif

__attribute__((noreturn)) void __assert_fail(const char * expression, const char * file, int line, const char * function) {
    char text[512];
    snprintf(text, sizeof text, "%s:%d: %s: assertion failed: %s", file, line, function, expression);
    pw_die(text);
}

// libc++'s hardening checks and libc++abi's terminate handler report here.
__attribute__((noreturn)) void __pw_abort_format(const char * format, va_list arguments) {
    char text[1024];
    vsnprintf(text, sizeof text, format, arguments);
    pw_die(text);
}

// The barrier of ggml spins here. There is no pause instruction in wasm, and giving the core away costs some 50 us, several times
// what one of ggml's operations takes on a small model: so spin first. Where the core is what the others wait for, because there
// are more threads than cores, every spin is lost: who has had to give it away spins half as long the next time, and a little
// longer again with every wait that was short.
#define MOST_SPINS   200000
#define FEWEST_SPINS 10000

void pw_relax(void) {
    static _Thread_local int limit = MOST_SPINS;
    static volatile int      never;
    pw_safepoint();
    if (spins++ == 0 && limit < MOST_SPINS) {
        limit += limit / 4;
    }
    if (spins >= limit) {
        limit = limit / 2 > FEWEST_SPINS ? limit / 2 : FEWEST_SPINS;
        spins = 1;
        pw_wait_slice(&never, 0, 1000);
    }
}
