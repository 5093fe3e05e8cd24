// What the product does not have: directories, a working folder, dynamic libraries. libc++ and ggml name these functions;
// answering here keeps them out of the module's imports.
#include <dirent.h>
#include <errno.h>
#include <stddef.h>
#include <unistd.h>

static int unsupported(void) {
    errno = ENOSYS;
    return -1;
}

DIR * __wasilibc_nocwd_opendirat(int folder, const char * path) {
    (void) folder; (void) path;
    unsupported();
    return NULL;
}

struct dirent * readdir(DIR * folder) {
    (void) folder;
    unsupported();
    return NULL;
}

int closedir(DIR * folder) {
    (void) folder;
    return unsupported();
}

char * getcwd(char * buffer, size_t size) {
    (void) buffer; (void) size;
    unsupported();
    return NULL;
}

long pathconf(const char * path, int name) {
    (void) path; (void) name;
    return unsupported();
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
    return unsupported();
}

char * dlerror(void) {
    return "a wasm module cannot load libraries";
}
