// What every generated thunk and trampoline needs: errors out, callbacks out, arguments in 8-byte slots.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define PW_EXPORT(name) extern "C" __attribute__((export_name(name)))

// The last C++ exception that reached the boundary. The host reads it after each call and sets the code back to 0.
// Only the engine's own thread runs thunks, so there is one writer.
struct pw_error_t {
    uint32_t code;
    char text[2044];
};

enum pw_error_code : uint32_t {
    PW_ERROR_NONE = 0,
    PW_ERROR_EXCEPTION = 1,      // std::exception; the text is what()
    PW_ERROR_OUT_OF_MEMORY = 2,  // std::bad_alloc or std::length_error
    PW_ERROR_UNKNOWN = 3,        // anything else that was thrown
    PW_ERROR_HOST = 4,           // a host import refused something; the text says what
};

extern "C" pw_error_t pw_error;

// nonzero: every guest thread traps at its next safepoint
extern "C" volatile int pw_stop;

// Records the exception being handled in pw_error. Out of line: one copy instead of one per thunk.
void pw_catch();

// Asks the host to run the Python target of a callback. slots[0] takes the result, slots[1..] hold the arguments.
// Traps when the host answers that the target raised: the exception is kept there and the guest must not go on.
void pw_callback(int32_t kind, int32_t id, uint64_t * slots);

// Runs one call into llama.cpp; on an exception records it and answers the zero of the result type.
template <typename F> static inline auto pw_guard(F call) -> decltype(call()) {
    try {
        return call();
    } catch (...) {
        pw_catch();
    }
    return decltype(call())();
}

// The id of a Python target travels where C code carries its user data.
static inline int32_t pw_id(const void * user_data) {
    return static_cast<int32_t>(reinterpret_cast<intptr_t>(user_data));
}

// Several functions that share one user data: it points to one id for each.
static inline int32_t pw_table_id(const void * table, int index) {
    return static_cast<const int32_t *>(table)[index];
}

// Widens one argument: integers are sign- or zero-extended as declared, pointers zero-extended, floats keep their bits.
template <typename T> static inline uint64_t pw_slot(T value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<uintptr_t>(value);
    } else if constexpr (std::is_floating_point_v<T>) {
        uint64_t bits = 0;
        std::memcpy(&bits, &value, sizeof value);
        return bits;
    } else if constexpr (std::is_enum_v<T>) {
        return pw_slot(static_cast<std::underlying_type_t<T>>(value));
    } else if constexpr (std::is_signed_v<T>) {
        return static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
        return value;
    }
}

// Narrows the result slot to the type that the C code expects.
template <typename T> static inline T pw_unslot(uint64_t slot) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(static_cast<uintptr_t>(slot));
    } else if constexpr (std::is_floating_point_v<T>) {
        T value;
        std::memcpy(&value, &slot, sizeof value);
        return value;
    } else if constexpr (std::is_same_v<T, bool>) {
        return slot != 0;
    } else {
        return static_cast<T>(slot);
    }
}
