# The product: one reactor module.
set(PW_LIBRARIES mtmd vendor_hash llama_common llama llama_models llama ggml_cpu ggml_base ggml_cpu pw_libcxx pw_libc pw_zigc pw_compiler_rt)

# Memory: 4 MiB of stack at the bottom (an overflow runs below address 0 and traps), growth up to the host's ceiling.
set(PW_LINK_FLAGS
    --import-memory --shared-memory --max-memory=4294901760 -z stack-size=4194304 --stack-first
    --gc-sections --strip-debug --export=__stack_pointer --build-id=none)

add_executable(llama_wasm
    ${HERE}/glue/reactor.c ${HERE}/glue/assertion.cpp ${HERE}/glue/chat.cpp ${HERE}/glue/grammar.cpp ${HERE}/glue/sampling.cpp
    ${HERE}/glue/speculative.cpp ${HERE}/glue/step.cpp ${HERE}/sysroot/nosys.c
    ${HERE}/abi/runtime.cpp ${HERE}/abi/thunks.cpp)
if(PW_FUZZ)
    target_sources(llama_wasm PRIVATE ${HERE}/sysroot/coverage.c)
endif()
target_compile_options(llama_wasm PRIVATE ${PW_SAFEPOINT_EDGES})
target_include_directories(llama_wasm PRIVATE ${HERE}/sysroot ${HERE}/abi ${LLAMA_CPP}/common ${LLAMA_CPP}/tools/mtmd)
target_link_libraries(llama_wasm PRIVATE pw_runtime pw_llama_headers ${PW_LIBRARIES})
target_link_options(llama_wasm PRIVATE ${PW_LINK_FLAGS}
    --wrap=llama_init_from_model --wrap=llama_model_load_from_file --wrap=llama_model_load_from_splits   # glue/assertion.cpp
    --no-entry --export-memory --export=pw_stop --export=pw_cancel --export=pw_error)
set_target_properties(llama_wasm PROPERTIES OUTPUT_NAME llama)
pw_memory_calls(llama_wasm)
