// Waiting, under musl's locks, conditions and sleeps: always in slices, so that a stopped engine never hangs.
#include "pw.h"

#include <errno.h>
#include <sched.h>
#include <time.h>

#include "pthread_impl.h"

#define NS_PER_S 1000000000LL

// Where threads sleep, by their number. Two of one place hide each other: then the slice ends the other's sleep.
#define N_PLACES 256
static volatile int * sleeping[N_PLACES];

void pw_wake_all(void) {
    for (int i = 0; i < N_PLACES; i++) {
        int * address = (int *) __atomic_load_n(&sleeping[i], __ATOMIC_SEQ_CST);
        if (address) {
            __builtin_wasm_memory_atomic_notify(address, -1);
        }
    }
}

bool pw_wait_slice(volatile int * address, int expected, int64_t timeout_ns) {
    const bool limited = timeout_ns >= 0 && timeout_ns <= PW_SLICE_NS;
    volatile int ** place = &sleeping[__pthread_self()->tid % N_PLACES];
    __atomic_store_n(place, address, __ATOMIC_SEQ_CST);
    pw_safepoint();   // behind the store: whoever sets the flag later finds the address
    const int woken = __builtin_wasm_memory_atomic_wait32((int *) address, expected, limited ? timeout_ns : PW_SLICE_NS);
    __atomic_store_n(place, 0, __ATOMIC_SEQ_CST);
    pw_safepoint();
    return !(limited && woken == 2);
}

void __wait(volatile int * address, volatile int * waiters, int value, int private) {
    (void) private;
    if (waiters) {
        __atomic_fetch_add(waiters, 1, __ATOMIC_SEQ_CST);
    }
    while (__atomic_load_n(address, __ATOMIC_SEQ_CST) == value) {
        pw_wait_slice(address, value, -1);
    }
    if (waiters) {
        __atomic_fetch_sub(waiters, 1, __ATOMIC_SEQ_CST);
    }
}

static int64_t remaining_ns(clockid_t clock, const struct timespec * deadline) {
    struct timespec now;
    clock_gettime(clock, &now);
    const int64_t ns = (int64_t) (deadline->tv_sec - now.tv_sec) * NS_PER_S + (deadline->tv_nsec - now.tv_nsec);
    return ns > 0 ? ns : 0;
}

int __timedwait_cp(volatile int * address, int value, clockid_t clock, const struct timespec * deadline, int private) {
    (void) private;
    if (deadline && (deadline->tv_nsec < 0 || deadline->tv_nsec >= NS_PER_S)) {
        return EINVAL;
    }
    // A wake-up without reason is allowed to every caller (they test their own state again), so one slice is enough.
    const int64_t left_ns = deadline ? remaining_ns(clock, deadline) : -1;
    return pw_wait_slice(address, value, left_ns) ? 0 : ETIMEDOUT;
}

int __timedwait(volatile int * address, int value, clockid_t clock, const struct timespec * deadline, int private) {
    return __timedwait_cp(address, value, clock, deadline, private);
}

// Sleeps and yields never leave the guest: no poll_oneoff and no sched_yield among the imports.
int clock_nanosleep(clockid_t clock, int flags, const struct timespec * request, struct timespec * remain) {
    static volatile int never;
    if (request->tv_sec < 0 || request->tv_nsec < 0 || request->tv_nsec >= NS_PER_S) {
        return EINVAL;
    }
    struct timespec end = *request;
    if (!(flags & TIMER_ABSTIME)) {
        clock_gettime(clock, &end);
        end.tv_sec += request->tv_sec;
        end.tv_nsec += request->tv_nsec;
        if (end.tv_nsec >= NS_PER_S) {
            end.tv_sec++;
            end.tv_nsec -= NS_PER_S;
        }
    }
    for (int64_t left_ns; (left_ns = remaining_ns(clock, &end)) > 0;) {
        pw_wait_slice(&never, 0, left_ns);
    }
    if (remain) {
        *remain = (struct timespec) {0};
    }
    return 0;
}

int nanosleep(const struct timespec * request, struct timespec * remain) {
    const int error = clock_nanosleep(CLOCK_REALTIME, 0, request, remain);
    if (error) {
        errno = error;
        return -1;
    }
    return 0;
}

int sched_yield(void) {
    static volatile int never;
    pw_wait_slice(&never, 0, 0);
    return 0;
}
