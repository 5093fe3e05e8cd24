// Replaces libc++abi's abort_message.cpp and libc++'s weak __libcpp_verbose_abort: the text belongs in the host's exception.
#include "pw.h"

#include <cstdarg>

extern "C" [[noreturn]] void __pw_abort_format(const char * format, va_list arguments);

extern "C" [[noreturn]] void __abort_message(const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    __pw_abort_format(format, arguments);
}

namespace std {
inline namespace __1 {
[[noreturn]] void __libcpp_verbose_abort(const char * format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    __pw_abort_format(format, arguments);
}
}
}
