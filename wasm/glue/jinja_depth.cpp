// How deep a chat template's calls may be nested (sysroot/forced/jinja_depth.h).
#include <cstddef>
#include <ctime>
#include <stdexcept>

#undef time

extern "C" char __stack_low, __stack_high;   // of the main thread, from the linker

// Of 4 MiB here, and as many of the stack that compiled code has: the rest is for what else a template may nest.
static const ptrdiff_t MOST_BYTES = 1 << 19;

static bool is_too_deep() {
    const char * here = static_cast<const char *>(__builtin_frame_address(0));
    return here >= &__stack_low && here <= &__stack_high && &__stack_high - here > MOST_BYTES;
}

namespace std {
time_t time_of_scope(time_t * now) {
    if (is_too_deep()) {
        throw runtime_error("its macros call each other too deep");
    }
    return time(now);
}
}
