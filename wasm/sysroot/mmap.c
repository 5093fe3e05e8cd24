// mmap and munmap through the host, which maps granted files into the linear memory.
#include "pw.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

void * mmap(void * address, size_t length, int protection, int flags, int fd, off_t offset) {
    (void) address;
    if (flags & (MAP_FIXED | MAP_ANONYMOUS) || protection & (PROT_WRITE | PROT_EXEC)) {
        errno = ENOTSUP;   // only read-only files are mapped here; memory comes from malloc
        return MAP_FAILED;
    }
    uint32_t mapped  = 0;
    const int error = pw_host_map_file(fd, offset, (int64_t) length, &mapped);
    if (error) {
        errno = error;
        return MAP_FAILED;
    }
    return (void *) mapped;
}

int munmap(void * address, size_t length) {
    const int error = pw_host_unmap_file(address, (int64_t) length);
    if (error) {
        errno = error;
        return -1;
    }
    return 0;
}

int posix_madvise(void * address, size_t length, int advice) {
    (void) address; (void) length; (void) advice;
    return 0;   // the host advises at mapping time
}

// Pinning pages is the host's business; llama.cpp warns and goes on.
int mlock(const void * address, size_t length) {
    (void) address; (void) length;
    errno = ENOTSUP;
    return -1;
}

int munlock(const void * address, size_t length) {
    (void) address; (void) length;
    return 0;
}
