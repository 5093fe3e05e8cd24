// What the product does not have: directories and a working folder. libc++ names these functions; answering here keeps them
// out of the module's imports. (The command modules of upstream's tests link the real ones.)
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
