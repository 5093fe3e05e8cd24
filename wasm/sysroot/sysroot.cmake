# The guest runtime: wasi-libc and musl by an explicit list, zig's libzigc and compiler-rt, libc++ with exceptions and
# threads, and our own threads, allocator, mappings and safepoints.
include(${CMAKE_CURRENT_LIST_DIR}/libc_sources.cmake)

set(SYSROOT ${CMAKE_CURRENT_LIST_DIR})
set(ZIG_LIBC ${PW_ZIG_LIB}/libc)
set(MUSL_TOP ${ZIG_LIBC}/wasi/libc-top-half/musl)

set(PW_C_INCLUDES
    ${PW_ZIG_LIB}/include ${ZIG_LIBC}/include/wasm-wasi-musl ${ZIG_LIBC}/include/generic-musl
    ${ZIG_LIBC}/include/wasm32-wasi-any ${ZIG_LIBC}/include/any-wasi-any)
set(PW_CXX_INCLUDES ${PW_ZIG_LIB}/libcxx/include ${PW_ZIG_LIB}/libcxxabi/include)
set(PW_EMULATED
    _WASI_EMULATED_MMAN _WASI_EMULATED_SIGNAL _WASI_EMULATED_PROCESS_CLOCKS _WASI_EMULATED_GETPID)
# What zig's driver would put into libc++'s __config_site.
set(PW_LIBCXX_CONFIG
    _LIBCPP_ABI_VERSION=1 _LIBCPP_ABI_NAMESPACE=__1 _LIBCPP_HAS_THREADS=1 _LIBCPP_HAS_THREAD_API_PTHREAD=1
    _LIBCPP_HAS_MONOTONIC_CLOCK=1 _LIBCPP_HAS_TERMINAL=0 _LIBCPP_HAS_MUSL_LIBC=1
    _LIBCXXABI_DISABLE_VISIBILITY_ANNOTATIONS _LIBCPP_DISABLE_VISIBILITY_ANNOTATIONS
    _LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=0 _LIBCPP_HAS_FILESYSTEM=1 _LIBCPP_HAS_RANDOM_DEVICE=1
    _LIBCPP_HAS_LOCALIZATION=1 _LIBCPP_HAS_UNICODE=1 _LIBCPP_HAS_WIDE_CHARACTERS=1 _LIBCPP_PSTL_BACKEND_SERIAL
    _LIBCPP_HARDENING_MODE_DEFAULT=4 _LIBCPP_HARDENING_MODE=4
    _LIBCPP_ASSERTION_SEMANTIC_DEFAULT=_LIBCPP_ASSERTION_SEMANTIC_ENFORCE _LIBCPP_HAS_TIME_ZONE_DATABASE=0)

# Headers and definitions of everything that is compiled against the sysroot.
add_library(pw_headers INTERFACE)
target_compile_options(pw_headers INTERFACE -nostdinc "$<$<COMPILE_LANGUAGE:CXX>:-nostdinc++>")
target_include_directories(pw_headers SYSTEM INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:${PW_CXX_INCLUDES}>" ${PW_C_INCLUDES})
target_compile_definitions(pw_headers INTERFACE
    ${PW_EMULATED} "$<$<COMPILE_LANGUAGE:CXX>:${PW_LIBCXX_CONFIG}>")

# --- libc -----------------------------------------------------------------------------------------------------------
# Its two halves see different private headers: musl's own, and those of the part that speaks WASI.
function(pw_libc_internals name)
    add_library(${name} INTERFACE)
    target_compile_options(${name} INTERFACE -std=gnu17 -fno-trapping-math)
    target_include_directories(${name} BEFORE INTERFACE ${ZIG_LIBC}/wasi/libc-bottom-half/cloudlibc/src ${ARGN})
    target_compile_definitions(${name} INTERFACE BULK_MEMORY_THRESHOLD=32 NDEBUG)
endfunction()
set(MUSL_INTERNALS
    ${MUSL_TOP}/src/include ${ZIG_LIBC}/musl/src/include ${MUSL_TOP}/src/internal ${ZIG_LIBC}/musl/src/internal)
pw_libc_internals(pw_musl_internals ${MUSL_INTERNALS}
    ${MUSL_TOP}/arch/wasm32 ${ZIG_LIBC}/musl/arch/generic ${ZIG_LIBC}/wasi/libc-top-half/headers/private)
pw_libc_internals(pw_wasi_internals
    ${ZIG_LIBC}/wasi/libc-bottom-half/headers/private ${ZIG_LIBC}/wasi/libc-bottom-half/cloudlibc/src/include ${MUSL_INTERNALS})

function(pw_libc_library name)
    set(musl ${ARGN})
    set(wasi ${ARGN})
    list(FILTER musl EXCLUDE REGEX "^wasi/libc-bottom-half/")
    list(FILTER wasi INCLUDE REGEX "^wasi/libc-bottom-half/")
    foreach(half musl wasi)
        list(TRANSFORM ${half} PREPEND ${ZIG_LIBC}/)
        add_library(${name}_${half} OBJECT ${${half}})
        target_link_libraries(${name}_${half} PRIVATE pw_${half}_internals pw_headers)
    endforeach()
    add_library(${name} STATIC $<TARGET_OBJECTS:${name}_musl> $<TARGET_OBJECTS:${name}_wasi>)
    set_target_properties(${name} PROPERTIES LINKER_LANGUAGE C)
endfunction()
pw_libc_library(pw_libc ${PW_LIBC_SOURCES})
# musl's mutex files name Linux futex calls on paths that are never taken.
foreach(source IN LISTS PW_LIBC_SOURCES)
    if(source MATCHES "^musl/src/thread/pthread_mutex")
        set_source_files_properties(${ZIG_LIBC}/${source} PROPERTIES COMPILE_OPTIONS "-include;${SYSROOT}/forced/musl_futex.h")
    endif()
endforeach()
# Files are read in larger pieces: each is a call of the host.
set_source_files_properties(${ZIG_LIBC}/wasi/libc-top-half/musl/src/stdio/__fdopen.c PROPERTIES
    COMPILE_OPTIONS "-include;${SYSROOT}/forced/musl_stdio.h")

# --- ours -----------------------------------------------------------------------------------------------------------
set(PW_RUNTIME_SOURCES stop.c wait.c thread.c thread_start.s cond.c heap.c memory.c mmap.c process.c nodl.c strtol.c)
list(TRANSFORM PW_RUNTIME_SOURCES PREPEND ${SYSROOT}/)
set_source_files_properties(${SYSROOT}/thread_start.s PROPERTIES LANGUAGE ASM)
# Two flavours: the product's, and that of the command modules of upstream's tests (PW_COMMAND: real exit and environment).
function(pw_runtime_library name)
    add_library(${name}_c OBJECT ${PW_RUNTIME_SOURCES})
    target_include_directories(${name}_c PRIVATE ${SYSROOT} ${DLMALLOC}/src)
    target_compile_definitions(${name}_c PRIVATE ${ARGN})
    target_link_libraries(${name}_c PRIVATE pw_musl_internals pw_headers)
    add_library(${name}_cxx OBJECT ${SYSROOT}/abort_message.cpp)
    target_include_directories(${name}_cxx PRIVATE ${SYSROOT})
    target_link_libraries(${name}_cxx PRIVATE pw_headers)
    add_library(${name} INTERFACE)
    target_sources(${name} INTERFACE $<TARGET_OBJECTS:${name}_c> $<TARGET_OBJECTS:${name}_cxx>)
endfunction()
pw_runtime_library(pw_runtime)

# Filling and copying memory is one instruction, which no stop flag ends: after linking all of them become calls of memory.c.
find_program(PW_PYTHON NAMES python3 python REQUIRED)
function(pw_memory_calls name)
    add_custom_command(TARGET ${name} POST_BUILD VERBATIM COMMAND ${PW_PYTHON} ${HERE}/memory_calls.py $<TARGET_FILE:${name}>)
    set_property(TARGET ${name} APPEND PROPERTY LINK_DEPENDS ${HERE}/memory_calls.py)
endfunction()

# --- zig's part of libc, and compiler-rt ----------------------------------------------------------------------------
set(PW_ZIG_CPU generic+simd128+relaxed_simd+atomics+bulk_memory+exception_handling+nontrapping_fptoint+sign_ext+mutable_globals+multivalue+reference_types)
function(pw_zig_object name source target)
    set(output ${CMAKE_BINARY_DIR}/${name}.o)
    add_custom_command(OUTPUT ${output} VERBATIM
        COMMAND ${CMAKE_COMMAND} -E env ZIG_GLOBAL_CACHE_DIR=${CMAKE_BINARY_DIR}/zig-cache ZIG_LOCAL_CACHE_DIR=${CMAKE_BINARY_DIR}/zig-cache
            ${PW_ZIG}/zig build-obj ${source} -target ${target} -mcpu=${PW_ZIG_CPU} -O ReleaseFast -fstrip ${ARGN}
            --name ${name} -femit-bin=${output}
        DEPENDS ${source})
    add_library(${name} STATIC ${output})
    set_target_properties(${name} PROPERTIES LINKER_LANGUAGE C)
endfunction()
pw_zig_object(pw_zigc ${PW_ZIG_LIB}/c.zig wasm32-wasi -lc)
pw_zig_object(pw_compiler_rt ${PW_ZIG_LIB}/compiler_rt.zig wasm32-freestanding)

# --- libc++ ---------------------------------------------------------------------------------------------------------
set(LIBCXX ${PW_ZIG_LIB}/libcxx)
set(LIBCXXABI ${PW_ZIG_LIB}/libcxxabi)
file(GLOB LIBCXX_SOURCES ${LIBCXX}/src/*.cpp ${LIBCXX}/src/ryu/*.cpp ${LIBCXX}/src/filesystem/*.cpp)
# new.cpp comes from libc++abi; verbose_abort.cpp is ours (sysroot/abort_message.cpp).
list(FILTER LIBCXX_SOURCES EXCLUDE REGEX "/(int128_builtins|new|verbose_abort)\\.cpp$")
# filesystem's operations.cpp asks musl for a Linux system call (copy_file_range).
set_source_files_properties(${LIBCXX}/src/filesystem/operations.cpp PROPERTIES COMPILE_OPTIONS "-U_LIBCPP_HAS_MUSL_LIBC;-D_LIBCPP_HAS_MUSL_LIBC=0")
file(GLOB LIBCXXABI_SOURCES ${LIBCXXABI}/src/*.cpp)
# Replaced by ours: abort_message.cpp, and cxa_thread_atexit.cpp (thread.c).
list(FILTER LIBCXXABI_SOURCES EXCLUDE REGEX "/(cxa_noexception|cxa_thread_atexit|abort_message)\\.cpp$")

add_library(pw_libcxx STATIC ${LIBCXX_SOURCES} ${LIBCXXABI_SOURCES} ${PW_ZIG_LIB}/libunwind/src/Unwind-wasm.c)
target_compile_options(pw_libcxx PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-std=c++23>")
target_compile_definitions(pw_libcxx PRIVATE
    _LIBCPP_BUILDING_LIBRARY _LIBCXX_BUILDING_LIBCXXABI LIBCXX_BUILDING_LIBCXXABI _LIBCXXABI_BUILDING_LIBRARY
    _LIBUNWIND_HIDE_SYMBOLS __USING_WASM_EXCEPTIONS__ NDEBUG)
target_include_directories(pw_libcxx PRIVATE
    ${LIBCXX}/src ${LIBCXX}/libc ${LIBCXX} ${LIBCXXABI}/include ${PW_ZIG_LIB}/libunwind/include)
set_source_files_properties(${PW_ZIG_LIB}/libunwind/src/Unwind-wasm.c PROPERTIES COMPILE_OPTIONS "-fwasm-exceptions;-mllvm;-wasm-use-legacy-eh=false")
target_link_libraries(pw_libcxx PRIVATE pw_headers)
# Order of headers: libc++'s before libc's.
