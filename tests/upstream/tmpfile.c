// wasi-libc declares tmpfile() and does not define it; test-gguf writes its files with it. The runner grants /tmp.

#include <errno.h>
#include <stdio.h>
#include <stdatomic.h>
#include <unistd.h>

FILE * tmpfile(void) {
    static atomic_uint counter;
    char path[32];
    snprintf(path, sizeof(path), "/tmp/tmpfile_%u", atomic_fetch_add(&counter, 1u));
    FILE * file = fopen(path, "w+b");
    if (file) {
        unlink(path);
    }
    return file;
}
