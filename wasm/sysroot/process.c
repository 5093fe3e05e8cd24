// The guest's view of its "machine": how many threads, which pages, no environment, no identity, no priorities.
#include "pw.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define WASM_PAGE_BYTES 65536

static volatile int n_threads = 1;

PW_EXPORTED(pw_set_n_threads) void pw_set_n_threads(int n) {
    n_threads = n > 0 ? n : 1;
}

long sysconf(int name) {
    switch (name) {
        case _SC_NPROCESSORS_CONF:
        case _SC_NPROCESSORS_ONLN:
            return n_threads;
        case _SC_PAGESIZE:
            return WASM_PAGE_BYTES;
        case _SC_PHYS_PAGES:
        case _SC_AVPHYS_PAGES:
            return (long) __builtin_wasm_memory_size(0);
        case _SC_CLK_TCK:
            return CLOCKS_PER_SEC;
        default:
            errno = EINVAL;
            return -1;
    }
}

int getpagesize(void) {
    return WASM_PAGE_BYTES;
}

// Asked for by llama.cpp's thread priorities and mlock; no answer they could act on.
struct rlimit;

int setpriority(int which, unsigned who, int priority) {
    (void) which; (void) who; (void) priority;
    errno = ENOTSUP;
    return -1;
}

int getrlimit(int resource, struct rlimit * limit) {
    (void) resource; (void) limit;
    errno = ENOTSUP;
    return -1;
}

unsigned getuid(void) {
    return 0;
}

#ifndef PW_COMMAND
char ** environ = (char *[]) {NULL};
char ** __environ = (char *[]) {NULL};

char * getenv(const char * name) {
    (void) name;
    return NULL;
}

// FILE* for the two functions of llama.h that take one.
PW_EXPORTED(pw_file_open) FILE * pw_file_open(const char * path, const char * mode) {
    return fopen(path, mode);
}

PW_EXPORTED(pw_file_close) int pw_file_close(FILE * file) {
    return fclose(file);
}
#endif
