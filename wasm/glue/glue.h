// What the glue shares: text out of the module, and the error record of the thunks.
#pragma once

#include "pw.h"
#include "thunk.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

// A copy the host frees with pw_free.
inline char * pw_copy_text(const std::string & text) {
    char * copy = static_cast<char *>(malloc(text.size() + 1));
    if (!copy) {
        throw std::bad_alloc();
    }
    memcpy(copy, text.c_str(), text.size() + 1);
    return copy;
}
