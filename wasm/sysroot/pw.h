// What the guest runtime shares between its files: the stop flag, sliced waits, and the imports of module "host".
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PW_IMPORT(name) __attribute__((import_module("host"), import_name(#name)))
#define PW_EXPORTED(name) __attribute__((export_name(#name), visibility("default"), used))

// Nonzero: every thread of the guest traps at its next safepoint. Set by the host, or here before any abort.
extern volatile int32_t pw_stop;
// Nonzero: the running call ends the clean way (ggml's abort callback, the load's progress callback).
extern volatile int32_t pw_cancel;

// Longest sleep in one go. A dying engine is noticed after at most this long.
#define PW_SLICE_NS 25000000LL

PW_IMPORT(map_file)     int32_t pw_host_map_file(int32_t fd, int64_t offset, int64_t length, uint32_t * address);
PW_IMPORT(unmap_file)   int32_t pw_host_unmap_file(void * address, int64_t length);
PW_IMPORT(thread_spawn) int32_t pw_host_thread_spawn(void * start);
PW_IMPORT(log)          void    pw_host_log(int32_t level, const char * text, size_t length);
PW_IMPORT(abort)        void    pw_host_abort(const char * text, size_t length);

// Tell the host why, stop every other thread, trap.
__attribute__((noreturn)) void pw_die(const char * text);
// Trap when the stop flag is set.
void pw_safepoint(void);
// Sleep while *address == expected, at most timeout_ns (< 0: no limit) and never longer than one slice.
// Returns false when the timeout, not the slice, ended the sleep.
bool pw_wait_slice(volatile int * address, int expected, int64_t timeout_ns);
// Wake every thread that sleeps there, for it to see the stop flag.
void pw_wake_all(void);

#ifdef __cplusplus
}
#endif
