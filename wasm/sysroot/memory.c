// Filling and copying memory with safepoints.
//
// memory.fill and memory.copy are one instruction of the machine each and end only when they are done, which takes a second a
// GiB where the pages were never touched: no stop flag is seen meanwhile. So every one of them that the linked module has, out
// of memset, std::vector or a loop that the compiler recognized, is made a call of one of these functions (memory_calls.py), and
// the instructions themselves work on pieces. A block of one piece, which is nearly every one, costs a comparison more.
#include "pw.h"

#include <wasm_simd128.h>

#define PIECE_BYTES ((size_t) 1 << 20)   // about a millisecond where memory is fresh
#define SHORT_BYTES 32                   // up to here the instructions cost more than two vectors

// What memory_calls.py looks for, and leaves as it is.
#define PW_MEMORY __attribute__((used, noinline, visibility("default")))

// Both ends are read before either is written, so the blocks may overlap.
static inline void copy_short(char * to, const char * from, size_t n) {
    if (n >= 16) {
        const v128_t first = wasm_v128_load(from), last = wasm_v128_load(from + n - 16);
        wasm_v128_store(to, first);
        wasm_v128_store(to + n - 16, last);
    } else if (n >= 8) {
        const v128_t first = wasm_v128_load64_zero(from), last = wasm_v128_load64_zero(from + n - 8);
        wasm_v128_store64_lane(to, first, 0);
        wasm_v128_store64_lane(to + n - 8, last, 0);
    } else if (n >= 4) {
        const v128_t first = wasm_v128_load32_zero(from), last = wasm_v128_load32_zero(from + n - 4);
        wasm_v128_store32_lane(to, first, 0);
        wasm_v128_store32_lane(to + n - 4, last, 0);
    } else if (n) {
        const char first = from[0], middle = from[n / 2], last = from[n - 1];
        to[0]     = first;
        to[n / 2] = middle;
        to[n - 1] = last;
    }
}

static inline void fill_short(char * to, int value, size_t n) {
    const v128_t bytes = wasm_i8x16_splat((int8_t) value);
    if (n >= 16) {
        wasm_v128_store(to, bytes);
        wasm_v128_store(to + n - 16, bytes);
    } else if (n >= 8) {
        wasm_v128_store64_lane(to, bytes, 0);
        wasm_v128_store64_lane(to + n - 8, bytes, 0);
    } else if (n >= 4) {
        wasm_v128_store32_lane(to, bytes, 0);
        wasm_v128_store32_lane(to + n - 4, bytes, 0);
    } else if (n) {
        to[0] = to[n / 2] = to[n - 1] = (char) value;
    }
}

// What __builtin_memset and __builtin_memmove of an unknown size are here: the instructions.
PW_MEMORY void pw_memory_fill(char * to, int value, size_t n) {
    if (n <= SHORT_BYTES) {
        fill_short(to, value, n);
        return;
    }
    for (; n > PIECE_BYTES; n -= PIECE_BYTES, to += PIECE_BYTES) {
        __builtin_memset(to, value, PIECE_BYTES);
        pw_safepoint();
    }
    __builtin_memset(to, value, n);
}

PW_MEMORY void pw_memory_copy(char * to, const char * from, size_t n) {
    if (n <= SHORT_BYTES) {
        copy_short(to, from, n);
        return;
    }
    if ((size_t) (to - from) < n) {   // it begins within the source: the last piece first
        for (; n > PIECE_BYTES; n -= PIECE_BYTES) {
            __builtin_memmove(to + n - PIECE_BYTES, from + n - PIECE_BYTES, PIECE_BYTES);
            pw_safepoint();
        }
    }
    for (; n > PIECE_BYTES; n -= PIECE_BYTES, to += PIECE_BYTES, from += PIECE_BYTES) {
        __builtin_memmove(to, from, PIECE_BYTES);
        pw_safepoint();
    }
    __builtin_memmove(to, from, n);
}

// libc's names, in the place of compiler-rt's. A caller of memcpy that should have used memmove is served as by the instruction.
void * memset(void * to, int value, size_t n) {
    pw_memory_fill(to, value, n);
    return to;
}

void * memmove(void * to, const void * from, size_t n) {
    pw_memory_copy(to, from, n);
    return to;
}

void * memcpy(void * restrict to, const void * restrict from, size_t n) {
    pw_memory_copy(to, from, n);
    return to;
}
