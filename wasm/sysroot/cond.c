// Condition variables: a counter that every signal moves on, and sliced waits on it. musl's own version queues waiters for
// a futex requeue, which wasm does not have.
#include "pw.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "pthread_impl.h"

// _c_seq counts signals, _c_clock holds the clock's number as pthread_condattr_setclock left it.

int pthread_cond_init(pthread_cond_t * restrict cond, const pthread_condattr_t * restrict attributes) {
    memset(cond, 0, sizeof *cond);
    if (attributes) {
        cond->_c_clock = attributes->__attr & 0x7fffffff;
    }
    return 0;
}

int pthread_cond_destroy(pthread_cond_t * cond) {
    (void) cond;
    return 0;
}

static int wake(pthread_cond_t * cond, int count) {
    __atomic_fetch_add(&cond->_c_seq, 1, __ATOMIC_SEQ_CST);
    __builtin_wasm_memory_atomic_notify((int *) &cond->_c_seq, count);
    return 0;
}

int pthread_cond_signal(pthread_cond_t * cond) {
    return wake(cond, 1);
}

int pthread_cond_broadcast(pthread_cond_t * cond) {
    return wake(cond, -1);
}

int pthread_cond_timedwait(pthread_cond_t * restrict cond, pthread_mutex_t * restrict mutex, const struct timespec * restrict deadline) {
    const int seen = __atomic_load_n(&cond->_c_seq, __ATOMIC_SEQ_CST);
    const clockid_t clock = cond->_c_clock == 1 ? CLOCK_MONOTONIC : CLOCK_REALTIME;
    pthread_mutex_unlock(mutex);
    int error = 0;
    while (!error && __atomic_load_n(&cond->_c_seq, __ATOMIC_SEQ_CST) == seen) {
        error = __timedwait(&cond->_c_seq, seen, clock, deadline, 1);
    }
    pthread_mutex_lock(mutex);
    return error;
}

int pthread_cond_wait(pthread_cond_t * restrict cond, pthread_mutex_t * restrict mutex) {
    return pthread_cond_timedwait(cond, mutex, NULL);
}
