// The allocator: Doug Lea's malloc over memory.grow, coalescing and locked.
//
// The linear memory is shared with the host, which grows it too (to map files), so pages from two growths need not be
// neighbours: morecore answers "where does the heap end" from its own record, never from memory.size.
#include "pw.h"

#include <errno.h>
#include <string.h>

static void * morecore(intptr_t increment);
_Noreturn static void heap_corrupt(void);

struct heap_lock { volatile int state; };   // 0 free, 1 held, 2 held and awaited
static int  lock_init(struct heap_lock * lock);
static int  lock_acquire(struct heap_lock * lock);
static int  lock_try(struct heap_lock * lock);
static void lock_release(struct heap_lock * lock);

#define USE_DL_PREFIX 1
#define DLMALLOC_EXPORT static __attribute__((unused))
#define HAVE_MMAP 0
#define HAVE_MREMAP 0
#define MORECORE morecore
#define MORECORE_CONTIGUOUS 1   // see morecore
#define MORECORE_CANNOT_TRIM 1
#define DEFAULT_GRANULARITY ((size_t) 1 << 20)
#define MALLOC_ALIGNMENT ((size_t) 16)
#define NO_MALLINFO 1
#define NO_MALLOC_STATS 1
#define LACKS_TIME_H 1
#define LACKS_SYS_MMAN_H 1
#define LACKS_SYS_PARAM_H 1
#define LACKS_UNISTD_H 1
#define malloc_getpagesize ((size_t) 65536)
#define ABORT heap_corrupt()
#define USE_LOCKS 2
#define MLOCK_T struct heap_lock
#define INITIAL_LOCK(lock) lock_init(lock)
#define DESTROY_LOCK(lock) (0)
#define ACQUIRE_LOCK(lock) lock_acquire(lock)
#define RELEASE_LOCK(lock) lock_release(lock)
#define TRY_LOCK(lock) lock_try(lock)
static struct heap_lock malloc_global_mutex = {0};

static size_t dlmalloc_usable_size(void *);

#include <malloc.c>   // dlmalloc's, from the include path

static int lock_init(struct heap_lock * lock) {
    lock->state = 0;
    return 0;
}

static int lock_try(struct heap_lock * lock) {
    return __sync_val_compare_and_swap(&lock->state, 0, 1) == 0;
}

static int lock_acquire(struct heap_lock * lock) {
    int state = __sync_val_compare_and_swap(&lock->state, 0, 1);
    if (state == 0) {
        return 0;
    }
    if (state != 2) {
        state = __atomic_exchange_n(&lock->state, 2, __ATOMIC_SEQ_CST);
    }
    while (state != 0) {
        pw_wait_slice(&lock->state, 2, -1);
        state = __atomic_exchange_n(&lock->state, 2, __ATOMIC_SEQ_CST);
    }
    return 0;
}

static void lock_release(struct heap_lock * lock) {
    if (__sync_fetch_and_sub(&lock->state, 1) != 1) {
        __atomic_store_n(&lock->state, 0, __ATOMIC_SEQ_CST);
        __builtin_wasm_memory_atomic_notify((int *) &lock->state, 1);
    }
}

#define WASM_PAGE_BYTES 65536

extern unsigned char __heap_base;   // end of the module's own data, from the linker

static void * morecore(intptr_t increment) {
    static char * end = (char *) &__heap_base;   // of the newest piece of heap; under the allocator's lock
    if (increment == 0) {
        return end;
    }
    if (increment < 0 || increment % WASM_PAGE_BYTES != 0) {
        return (void *) -1;
    }
    // dlmalloc asks first for what the free end of the heap lacks, which helps only right behind it, and then, with this bit
    // set, for all of it anywhere. The bit is taken back: a file mapped in between ends the first way once, not for ever.
    const int must_follow = !use_noncontiguous(gm);
    if (must_follow && __builtin_wasm_memory_size(0) * WASM_PAGE_BYTES != (size_t) end) {
        return (void *) -1;
    }
    gm->mflags &= ~USE_NONCONTIGUOUS_BIT;
    const size_t pages = (size_t) increment / WASM_PAGE_BYTES;
    const size_t old   = __builtin_wasm_memory_grow(0, pages);
    if (old == (size_t) -1) {
        errno = ENOMEM;
        return (void *) -1;
    }
    char * piece = (char *) (old * WASM_PAGE_BYTES);
    if (must_follow && piece != end) {
        return (void *) -1;   // the host grew the memory in this very moment; these pages are lost
    }
    end = piece + increment;
    return piece;
}

_Noreturn static void heap_corrupt(void) {
    pw_die("the guest's heap is corrupt");
}

// No object is larger than what differences of pointers can tell (C), though the memory might have room.
static int is_too_large(size_t size) {
    if (size <= PTRDIFF_MAX) {
        return 0;
    }
    errno = ENOMEM;
    return 1;
}

void * malloc(size_t size) { return is_too_large(size) ? NULL : dlmalloc(size); }
void   free(void * block) { dlfree(block); }
void * realloc(void * block, size_t size) { return is_too_large(size) ? NULL : dlrealloc(block, size); }
void * memalign(size_t alignment, size_t size) { return is_too_large(size) ? NULL : dlmemalign(alignment, size); }
void * aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

void * calloc(size_t count, size_t size) {
    size_t total;
    const int overflows = __builtin_mul_overflow(count, size, &total);
    return is_too_large(overflows ? SIZE_MAX : total) ? NULL : dlcalloc(1, total);
}

int posix_memalign(void ** block, size_t alignment, size_t size) {
    return is_too_large(size) ? ENOMEM : dlposix_memalign(block, alignment, size);
}

size_t malloc_usable_size(void * block) { return dlmalloc_usable_size(block); }

void * reallocarray(void * block, size_t count, size_t size) {
    size_t total;
    const int overflows = __builtin_mul_overflow(count, size, &total);
    return realloc(block, overflows ? SIZE_MAX : total);
}

// musl's internal names.
void * __libc_malloc(size_t size) { return malloc(size); }
void   __libc_free(void * block) { dlfree(block); }
void * __libc_calloc(size_t count, size_t size) { return calloc(count, size); }

PW_EXPORTED(pw_alloc) void * pw_alloc(size_t size) { return malloc(size); }
PW_EXPORTED(pw_free) void pw_free(void * block) { dlfree(block); }
// Bytes the heap has taken from the linear memory; mapped files, stacks of the module and its data are not in it.
PW_EXPORTED(pw_heap_bytes) size_t pw_heap_bytes(void) { return dlmalloc_footprint(); }
