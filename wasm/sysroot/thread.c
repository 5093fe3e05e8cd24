// Threads: creation, end, join. Locks and conditions are musl's own files over wait.c.
//
// One block of the heap per thread:   [ header | stack (grows down to the header) | TLS ]
// The host runs pw_thread_start (thread_start.s) on a new instance: it sets the stack pointer and the TLS base from the
// header and calls pw_thread_main. Joining frees the block; a detached thread's block is freed by the next creation.
#include "pw.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pthread_impl.h"
#include "stdio_impl.h"

#define MIN_STACK_BYTES (1u << 20)
#define ALIGNMENT 64u
#define RETRY_NS 1000000LL
#define SPAWN_TIMEOUT_S 10

struct header {
    void *          stack_top;   // read by thread_start.s at offset 0
    void *          tls_base;    //  ... and at offset sizeof(void *)
    volatile int    running;     //  ... cleared and notified there at offset 2 * sizeof(void *), off the stack
    void *          (*entry)(void *);
    void *          argument;
    struct pthread * self;
    struct header * next_detached;
};

static volatile int list_lock;          // guards the ring of threads and the list of detached blocks
static struct header * detached_blocks;
static volatile int next_tid = 2;       // the main thread is 1
static char main_marker;

// musl's name for the lock of the thread ring; also taken by pthread_key_delete.
void __tl_lock(void) {
    while (__atomic_exchange_n(&list_lock, 1, __ATOMIC_SEQ_CST)) {
        pw_wait_slice(&list_lock, 1, -1);
    }
}

void __tl_unlock(void) {
    __atomic_store_n(&list_lock, 0, __ATOMIC_SEQ_CST);
    __builtin_wasm_memory_atomic_notify((int *) &list_lock, 1);
}

extern FILE __stdin_FILE, __stdout_FILE, __stderr_FILE;

static void init_self(struct pthread * self, int tid) {
    self->self   = self;
    self->tid    = tid;
    self->locale = &libc.global_locale;
    self->robust_list.head = &self->robust_list.head;
}

// Threads exist from the start: musl's locks must never take their single-threaded short cuts.
__attribute__((constructor(101))) static void init_main_thread(void) {
    struct pthread * self = __pthread_self();
    init_self(self, 1);
    self->prev = self->next = self;
    self->map_base          = (void *) &main_marker;
    self->detach_state      = DT_JOINABLE;
    libc.threaded           = 1;
    libc.need_locks         = 1;
    __stdin_FILE.lock = __stdout_FILE.lock = __stderr_FILE.lock = 0;
}

void __wasi_init_tp(void) {}

extern void __wasm_init_tls(void *);

// Lay a fresh TLS image at `base` and return where the new thread's struct pthread lies in it.
static struct pthread * init_tls(void * base) {
    uintptr_t own_base = (uintptr_t) __builtin_wasm_tls_base();
    const uintptr_t offset = (uintptr_t) &__wasilibc_pthread_self - own_base;
    __wasm_init_tls(base);   // also moves __tls_base: put ours back
    __asm__ volatile("local.get %0\nglobal.set __tls_base\n" ::"r"(own_base));
    return (struct pthread *) ((uintptr_t) base + offset);
}

static void free_detached_blocks(void) {
    struct header * done = NULL;
    __tl_lock();
    for (struct header ** link = &detached_blocks; *link;) {
        struct header * block = *link;
        if (__atomic_load_n(&block->running, __ATOMIC_SEQ_CST)) {
            link = &block->next_detached;
            continue;
        }
        *link                = block->next_detached;
        block->next_detached = done;
        done                 = block;
    }
    __tl_unlock();
    while (done) {
        struct header * next = done->next_detached;
        free(done);
        done = next;
    }
}

static size_t round_up(size_t n) {
    return (n + ALIGNMENT - 1) & ~(size_t) (ALIGNMENT - 1);
}

static struct header * new_block(size_t stack_bytes) {
    const size_t head = round_up(sizeof(struct header));
    const size_t tsd  = round_up(sizeof(void *) * PTHREAD_KEYS_MAX);
    const size_t tls  = round_up(__builtin_wasm_tls_size() + __builtin_wasm_tls_align());
    if (stack_bytes < MIN_STACK_BYTES) {
        stack_bytes = MIN_STACK_BYTES;
    }
    stack_bytes = round_up(stack_bytes);
    char * base = aligned_alloc(ALIGNMENT, head + stack_bytes + tsd + tls);
    if (!base) {
        return NULL;
    }
    struct header * block = (struct header *) base;
    memset(block, 0, sizeof *block);
    memset(base + head + stack_bytes, 0, tsd + tls);
    block->stack_top  = base + head + stack_bytes;
    block->tls_base   = base + head + stack_bytes + tsd;
    block->self       = init_tls(block->tls_base);
    block->self->tsd  = (void **) (base + head + stack_bytes);
    block->self->map_base   = (void *) block;
    block->self->stack      = block->stack_top;
    block->self->stack_size = stack_bytes;
    return block;
}

static void ring_insert(struct pthread * self) {
    __tl_lock();
    struct pthread * here = __pthread_self();
    self->prev = here;
    self->next = here->next;
    here->next->prev = self;
    here->next = self;
    __tl_unlock();
}

static void ring_remove(struct pthread * self) {
    __tl_lock();
    self->next->prev = self->prev;
    self->prev->next = self->next;
    __tl_unlock();
}

static volatile int n_ended;

static time_t now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

// The host grants a number of threads; spawns beyond it wait here for one to end. Threads that wait for each other (a
// ggml pool larger than the grant) would never end: after a time without any end the creation fails, which ggml and
// libc++ report, instead of hanging.
static int spawn(struct header * block) {
    static volatile int never;
    int    seen  = n_ended;
    time_t since = now_s();
    do {
        const int tid = pw_host_thread_spawn(block);
        if (tid != -EAGAIN) {
            return tid;
        }
        pw_wait_slice(&never, 0, RETRY_NS);
        if (n_ended != seen) {
            seen  = n_ended;
            since = now_s();
        }
    } while (now_s() - since <= SPAWN_TIMEOUT_S);
    return -EAGAIN;
}

int pthread_create(pthread_t * restrict result, const pthread_attr_t * restrict attributes, void * (*entry)(void *), void * restrict argument) {
    free_detached_blocks();
    struct header * block = new_block(attributes ? attributes->_a_stacksize : 0);
    if (!block) {
        return EAGAIN;
    }
    block->entry    = entry;
    block->argument = argument;
    block->running  = 1;
    init_self(block->self, __atomic_fetch_add(&next_tid, 1, __ATOMIC_SEQ_CST));
    block->self->detach_state = attributes && attributes->_a_detach ? DT_DETACHED : DT_JOINABLE;
    ring_insert(block->self);
    *result = block->self;   // before the start: the new thread may end and be freed at any time after it
    if (spawn(block) < 0) {
        ring_remove(block->self);
        free(block);
        return EAGAIN;
    }
    return 0;
}

// C++ thread_local destructors, newest first.
struct destructor {
    void (*run)(void *);
    void *              object;
    struct destructor * next;
};
static _Thread_local struct destructor * destructors;

int __cxa_thread_atexit(void (*run)(void *), void * object, void * library) {
    (void) library;
    struct destructor * entry = malloc(sizeof *entry);
    if (!entry) {
        return -1;
    }
    *entry      = (struct destructor) {run, object, destructors};
    destructors = entry;
    return 0;
}

static void run_destructors(void) {
    while (destructors) {   // one may register another
        struct destructor entry = *destructors;
        free(destructors);
        destructors = entry.next;
        entry.run(entry.object);
    }
}

static void end_thread(struct pthread * self) {
    run_destructors();
    __pthread_tsd_run_dtors();
    struct header * block = (struct header *) self->map_base;
    ring_remove(self);
    __atomic_fetch_add(&n_ended, 1, __ATOMIC_SEQ_CST);
    if (__atomic_exchange_n(&self->detach_state, DT_EXITED, __ATOMIC_SEQ_CST) == DT_DETACHED) {
        __tl_lock();
        block->next_detached = detached_blocks;
        detached_blocks      = block;
        __tl_unlock();
    }
}

// Called by pw_thread_start on the new stack.
__attribute__((used)) void pw_thread_main(struct header * block) {
    block->self->result = block->entry(block->argument);
    end_thread(block->self);
}

static int join(pthread_t thread, void ** result) {
    struct header * block = (struct header *) thread->map_base;
    while (__atomic_load_n(&block->running, __ATOMIC_SEQ_CST)) {
        pw_wait_slice(&block->running, 1, -1);
    }
    if (result) {
        *result = thread->result;
    }
    free(block);
    return 0;
}

int pthread_join(pthread_t thread, void ** result) {
    if (thread == __pthread_self()) {
        return EDEADLK;
    }
    return join(thread, result);
}

int pthread_detach(pthread_t thread) {
    int joinable = DT_JOINABLE;
    if (__atomic_compare_exchange_n(&thread->detach_state, &joinable, DT_DETACHED, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        return 0;
    }
    return joinable == DT_EXITED ? join(thread, NULL) : EINVAL;
}

__attribute__((noreturn)) void pthread_exit(void * result) {
    (void) result;
    pw_die("pthread_exit() is not supported");   // it would have to unwind; neither llama.cpp nor libc++ calls it
}
