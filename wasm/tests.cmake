# Upstream's own tests as command modules (`_start`, argv, real exit), run by tests/upstream in the product's host with
# folders the product never grants. Same libraries, same runtime, same kernels as the module.
pw_runtime_library(pw_runtime_command PW_COMMAND)
pw_libc_library(pw_libc_command ${PW_LIBC_COMMAND_SOURCES})
add_library(pw_crt_objects OBJECT ${ZIG_LIBC}/wasi/libc-bottom-half/crt/crt1-command.c)
target_link_libraries(pw_crt_objects PRIVATE pw_wasi_internals pw_headers)
add_library(pw_crt INTERFACE)
target_sources(pw_crt INTERFACE $<TARGET_OBJECTS:pw_crt_objects>)

set(UPSTREAM_TESTS ${LLAMA_CPP}/tests)
set(OUR_TEST_SOURCES ${HERE}/../tests/upstream)

# arg.cpp and preset.cpp serve the tests that parse llama.cpp's command line; downloads are stubbed.
add_library(llama_common_arg STATIC
    ${LLAMA_CPP}/common/arg.cpp ${LLAMA_CPP}/common/preset.cpp ${LLAMA_CPP}/common/subproc.cpp ${OUR_TEST_SOURCES}/no_download.cpp)
target_include_directories(llama_common_arg PRIVATE ${OUR_TEST_SOURCES}/shim ${LLAMA_CPP}/common)
target_link_libraries(llama_common_arg PRIVATE pw_llama_headers)
target_compile_options(llama_common_arg PRIVATE -O1)

function(pw_command_test name source)
    add_executable(${name} ${source} ${OUR_TEST_SOURCES}/tmpfile.c)
    target_compile_options(${name} PRIVATE -O1 -UNDEBUG)
    target_include_directories(${name} PRIVATE
        ${LLAMA_CPP}/common ${LLAMA_CPP}/src ${GGML}/src ${UPSTREAM_TESTS} ${OUR_TEST_SOURCES}/shim)
    target_link_libraries(${name} PRIVATE pw_crt pw_runtime_command pw_llama_headers
        llama_common_arg llama_common llama_common_arg llama llama_models llama ggml_cpu ggml_base ggml_cpu
        pw_libcxx pw_libc_command pw_libc pw_libc_command pw_zigc pw_compiler_rt)
    target_link_options(${name} PRIVATE ${PW_LINK_FLAGS} --export-memory --export=pw_stop --export=pw_cancel)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
    pw_memory_calls(${name})
endfunction()

foreach(name
        test-gguf test-quantize-fns test-barrier test-sampling test-grammar-parser test-llama-grammar
        test-json-schema-to-grammar test-chat-template test-tokenizer-0 test-save-load-state test-backend-ops
        test-jinja test-unicode test-batch-alloc test-alloc test-rope test-grammar-integration)
    pw_command_test(${name} ${UPSTREAM_TESTS}/${name}.cpp)
endforeach()
# Ours: the guest runtime and the kernels, from inside.
pw_command_test(runtime-test ${HERE}/selftest/runtime_test.cpp)
pw_command_test(kernels-test ${HERE}/selftest/kernels_test.cpp)
target_include_directories(kernels-test PRIVATE ${GGML}/src/ggml-cpu)
