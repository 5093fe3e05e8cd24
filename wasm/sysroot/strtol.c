// Texts to integers, by musl's scanner. zig's own stop in the midst of a number that is too large and say that it ends
// there; who checked the digits before takes that for a broken text (nlohmann's JSON parser asserts).
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>

#include "intscan.h"
#include "shgetc.h"
#include "stdio_impl.h"

static unsigned long long scan(const char * text, char ** end, int base, unsigned long long limit) {
    FILE file;
    sh_fromstring(&file, text);
    shlim(&file, 0);
    const unsigned long long value = __intscan(&file, base, 1, limit);
    if (end != NULL) {
        *end = (char *) text + shcnt(&file);
    }
    return value;
}

long long strtoll(const char * restrict text, char ** restrict end, int base) {
    return (long long) scan(text, end, base, LLONG_MIN);
}

unsigned long long strtoull(const char * restrict text, char ** restrict end, int base) {
    return scan(text, end, base, ULLONG_MAX);
}

long strtol(const char * restrict text, char ** restrict end, int base) {
    return (long) scan(text, end, base, 0UL + LONG_MIN);
}

unsigned long strtoul(const char * restrict text, char ** restrict end, int base) {
    return (unsigned long) scan(text, end, base, ULONG_MAX);
}

intmax_t strtoimax(const char * restrict text, char ** restrict end, int base) {
    return strtoll(text, end, base);
}

uintmax_t strtoumax(const char * restrict text, char ** restrict end, int base) {
    return strtoull(text, end, base);
}
