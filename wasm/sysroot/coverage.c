// Of the fuzz build alone: where clang's edge counters lie. The host reads them out of the linear memory, and zeroes them.
#include "pw.h"

static char * counters_begin;
static char * counters_end;

// Each object file's constructor calls this with the bounds of the one section into which the linker gathers all counters.
__attribute__((used)) void __sanitizer_cov_8bit_counters_init(char * begin, char * end) {
    counters_begin = begin;
    counters_end   = end;
}

// The address of the first counter; each is one byte, of one edge, and wraps.
PW_EXPORTED(pw_coverage_begin) char * pw_coverage_begin(void) {
    return counters_begin;
}

// The address behind the last one.
PW_EXPORTED(pw_coverage_end) char * pw_coverage_end(void) {
    return counters_end;
}
