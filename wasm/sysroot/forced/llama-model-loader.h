// Force-included into llama-model-loader.cpp, which logs the first 40 characters of each list in a file and spells the
// whole list for that: of a vocabulary and its merges that is a part of the load that one notices.
#pragma once
#include "llama-impl.h"

#include <cstdint>
#include <string>

#include "gguf.h"

// Return what gguf_kv_to_str does; of the lists that are long, those of a vocabulary, only the beginning.
static inline std::string pw_kv_head(const struct gguf_context * ctx, int i) {
    constexpr size_t     enough = 64;
    const enum gguf_type type   = gguf_get_kv_type(ctx, i) == GGUF_TYPE_ARRAY ? gguf_get_arr_type(ctx, i) : GGUF_TYPE_ARRAY;
    if (type != GGUF_TYPE_STRING && type != GGUF_TYPE_INT32 && type != GGUF_TYPE_FLOAT32) {
        return gguf_kv_to_str(ctx, i);
    }
    const void * data = type == GGUF_TYPE_STRING ? nullptr : gguf_get_arr_data(ctx, i);
    const size_t n    = gguf_get_arr_n(ctx, i);
    std::string  head = "[";
    for (size_t j = 0; j < n && head.size() < enough; j++) {
        std::string item;
        if (type == GGUF_TYPE_STRING) {
            item = gguf_get_arr_str(ctx, i, j);
            replace_all(item, "\\", "\\\\");
            replace_all(item, "\"", "\\\"");
            item = '"' + item + '"';
        } else if (type == GGUF_TYPE_INT32) {
            item = std::to_string(((const int32_t *) data)[j]);
        } else {
            item = std::to_string(((const float *) data)[j]);
        }
        head += item + (j + 1 < n ? ", " : "");
    }
    return head + "]";
}
#define gguf_kv_to_str pw_kv_head
