// What no wasm module has: dynamic libraries, users, limits of paths. ggml, common and libc++ name these functions.
#include <errno.h>
#include <stddef.h>

struct passwd;

struct passwd * getpwuid(unsigned user) {
    (void) user;
    errno = ENOSYS;
    return NULL;
}

long pathconf(const char * path, int name) {
    (void) path; (void) name;
    errno = ENOSYS;
    return -1;
}

void * dlopen(const char * file, int mode) {
    (void) file; (void) mode;
    return NULL;
}

void * dlsym(void * library, const char * name) {
    (void) library; (void) name;
    return NULL;
}

int dlclose(void * library) {
    (void) library;
    errno = ENOSYS;
    return -1;
}

char * dlerror(void) {
    return "a wasm module cannot load libraries";
}
