# llama.cpp itself: ggml (CPU), src with every model, common and mtmd, unedited. What must differ is done by forced
# includes (sysroot/forced), definitions, and files left out.
set(GGML ${LLAMA_CPP}/ggml)

# CMake templates upstream fills from git.
file(READ ${HERE}/sources.lock PW_LOCK)
string(JSON PW_BUILD_TAG GET ${PW_LOCK} llama.cpp build)
string(REGEX REPLACE "^b" "" LLAMA_BUILD_NUMBER ${PW_BUILD_TAG})
set(GGML_VERSION "0.0.${LLAMA_BUILD_NUMBER}")
set(LLAMA_VERSION "0.0.${LLAMA_BUILD_NUMBER}")
set(GGML_BUILD_COMMIT ${PW_BUILD_TAG})
set(LLAMA_BUILD_COMMIT ${PW_BUILD_TAG})
set(BUILD_COMPILER "clang (ziglang wheel)")
set(BUILD_TARGET "wasm32-wasip1-threads")
set(PW_GENERATED ${CMAKE_BINARY_DIR}/generated)
configure_file(${GGML}/src/ggml-version.h.in ${PW_GENERATED}/ggml-version.h @ONLY)
configure_file(${LLAMA_CPP}/src/llama-version.h.in ${PW_GENERATED}/llama-version.h @ONLY)
configure_file(${LLAMA_CPP}/common/build-info.cpp.in ${PW_GENERATED}/build-info.cpp @ONLY)

add_library(pw_llama_headers INTERFACE)
target_include_directories(pw_llama_headers INTERFACE
    ${LLAMA_CPP}/include ${GGML}/include ${PW_GENERATED} ${LLAMA_CPP}/vendor)
target_compile_definitions(pw_llama_headers INTERFACE _GNU_SOURCE _XOPEN_SOURCE=600 GGML_USE_CPU)
target_link_libraries(pw_llama_headers INTERFACE pw_headers)

# Safepoints (sysroot/stop.c): on every edge of control code, on every function of ggml's compute code.
# clang puts the edge hooks into exception cleanups too, without the operand that says so; LLVM's preparation of exception
# handlers then takes these calls for impossible and cuts the code behind them off, rethrow included. -disable-cleanups
# keeps it from doing so (tests/wasm/test_glue.py throws through such cleanups).
set(PW_SAFEPOINT_EDGES "-fsanitize-coverage=edge,trace-pc;SHELL:-mllvm -disable-cleanups")
set(PW_SAFEPOINT_FUNCTIONS "-fsanitize-coverage=func,trace-pc")
if(PW_FUZZ)
    # The same places count too (sysroot/coverage.c). Control code is inlined less, so that an edge is one of the source.
    list(APPEND PW_SAFEPOINT_EDGES -fsanitize-coverage=inline-8bit-counters -O1)
    list(APPEND PW_SAFEPOINT_FUNCTIONS -fsanitize-coverage=inline-8bit-counters)
endif()

function(pw_force_include source header)
    set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS "-include;${HERE}/sysroot/forced/${header}")
    set_property(SOURCE ${source} APPEND PROPERTY OBJECT_DEPENDS ${HERE}/sysroot/forced/${header})
endfunction()

# --- ggml -----------------------------------------------------------------------------------------------------------
add_library(ggml_base STATIC
    ${GGML}/src/ggml.c ${GGML}/src/ggml.cpp ${GGML}/src/ggml-alloc.c ${GGML}/src/ggml-backend.cpp
    ${GGML}/src/ggml-backend-meta.cpp ${GGML}/src/ggml-opt.cpp ${GGML}/src/ggml-threading.cpp ${GGML}/src/ggml-quants.c
    ${GGML}/src/gguf.cpp ${GGML}/src/ggml-backend-reg.cpp ${GGML}/src/ggml-backend-dl.cpp)
target_compile_options(ggml_base PRIVATE ${PW_SAFEPOINT_EDGES})

file(GLOB GGML_CPU_SOURCES CONFIGURE_DEPENDS
    ${GGML}/src/ggml-cpu/*.c ${GGML}/src/ggml-cpu/*.cpp ${GGML}/src/ggml-cpu/tiled/*.cpp ${GGML}/src/ggml-cpu/amx/*.cpp
    ${GGML}/src/ggml-cpu/arch/wasm/*.c)
list(FILTER GGML_CPU_SOURCES EXCLUDE REGEX "/hbm\\.cpp$")
add_library(ggml_cpu STATIC ${GGML_CPU_SOURCES})
target_compile_options(ggml_cpu PRIVATE ${PW_SAFEPOINT_FUNCTIONS})
target_compile_definitions(ggml_cpu PRIVATE NDEBUG GGML_USE_CPU_REPACK)
if(NOT PW_STOCK_KERNELS)
    # Our kernels (wasm/kernels) take the place of upstream's, which keep another name and are dropped by the linker.
    file(GLOB PW_KERNELS CONFIGURE_DEPENDS ${HERE}/kernels/*.c ${HERE}/kernels/*.cpp)
    target_sources(ggml_cpu PRIVATE ${PW_KERNELS})
    function(pw_replace source)
        foreach(name ${ARGN})
            set_property(SOURCE ${GGML}/src/ggml-cpu/${source} APPEND PROPERTY COMPILE_DEFINITIONS ${name}=upstream_${name})
        endforeach()
    endfunction()
    pw_replace(arch/wasm/quants.c quantize_row_q8_0 quantize_row_q8_1 quantize_row_q8_K
        ggml_vec_dot_q4_0_q8_0 ggml_vec_dot_q4_1_q8_1 ggml_vec_dot_q5_1_q8_1 ggml_vec_dot_q2_K_q8_K ggml_vec_dot_q3_K_q8_K
        ggml_vec_dot_q4_K_q8_K ggml_vec_dot_q5_K_q8_K ggml_vec_dot_q6_K_q8_K)
    pw_replace(quants.c ggml_vec_dot_iq4_nl_q8_0 ggml_vec_dot_iq4_xs_q8_K ggml_vec_dot_mxfp4_q8_0 ggml_vec_dot_tq2_0_q8_K)
    pw_replace(vec.cpp ggml_vec_dot_f16 ggml_vec_dot_bf16 ggml_vec_silu_f32 ggml_vec_swiglu_f32 ggml_vec_soft_max_f32)
    pw_replace(tiled/tiled.cpp ggml_tiled_wdata_size ggml_compute_forward_mul_mat_id_tiled)
    set_property(SOURCE ${GGML}/src/ggml-cpu/ggml-cpu.cpp APPEND PROPERTY COMPILE_DEFINITIONS
        ggml_backend_cpu_repack_buffer_type=pw_repack_buffer_type)
    pw_force_include(${GGML}/src/ggml-cpu/ggml-cpu.c half_rows.h)
    set_source_files_properties(${GGML}/src/ggml-cpu/ops.cpp PROPERTIES
        COMPILE_DEFINITIONS "ggml_compute_forward_flash_attn_ext=upstream_flash_attn_ext")
    pw_replace(ops.cpp ggml_compute_forward_norm ggml_compute_forward_rms_norm ggml_compute_forward_rms_norm_mul_fused
        ggml_compute_forward_group_norm ggml_compute_forward_l2_norm ggml_compute_forward_rope)
    pw_force_include(${GGML}/src/ggml-cpu/ops.cpp ggml-ops.h)
    # GGML_USE_LLAMAFILE: ggml offers every matrix product to llamafile_sgemm first, which is ours (kernels/matmul.c).
    target_compile_definitions(ggml_cpu PRIVATE GGML_USE_LLAMAFILE)
    target_compile_options(ggml_cpu PRIVATE "SHELL:-include ${HERE}/sysroot/forced/ggml-simd.h")
endif()
pw_force_include(${GGML}/src/ggml-cpu/ggml-cpu.c ggml-cpu.h)

foreach(library ggml_base ggml_cpu)
    target_include_directories(${library} PRIVATE ${GGML}/src ${GGML}/src/ggml-cpu)
    target_link_libraries(${library} PRIVATE pw_llama_headers)
endforeach()
# Quantisation's inner loops are compute code. Not contracted to fused operations: files must be those native writes.
set_source_files_properties(${GGML}/src/ggml-quants.c PROPERTIES COMPILE_OPTIONS "-ffp-contract=off;-fno-sanitize-coverage=edge,trace-pc;${PW_SAFEPOINT_FUNCTIONS}")

# --- libllama: assertions stay on where files are read --------------------------------------------------------------
file(GLOB LLAMA_SOURCES CONFIGURE_DEPENDS ${LLAMA_CPP}/src/*.cpp)
file(GLOB LLAMA_MODEL_SOURCES CONFIGURE_DEPENDS ${LLAMA_CPP}/src/models/*.cpp)
add_library(llama STATIC ${LLAMA_SOURCES})
# The model files are many and small: in batches they compile four times as fast.
add_library(llama_models STATIC ${LLAMA_MODEL_SOURCES})
set_target_properties(llama_models PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
# Samplers' plain loops over the vocabulary, and its sorting, are compute code; the others may be long.
set_source_files_properties(${LLAMA_CPP}/src/llama-sampler.cpp PROPERTIES
    COMPILE_OPTIONS "-fsanitize-coverage-ignorelist=${HERE}/sysroot/no_safepoints.txt"
    OBJECT_DEPENDS ${HERE}/sysroot/no_safepoints.txt)
foreach(library llama llama_models)
    target_compile_options(${library} PRIVATE ${PW_SAFEPOINT_EDGES})
    target_include_directories(${library} PRIVATE ${LLAMA_CPP}/src)
    target_link_libraries(${library} PRIVATE pw_llama_headers)
endforeach()
pw_force_include(${LLAMA_CPP}/src/llama-mmap.cpp llama-mmap.h)
pw_force_include(${LLAMA_CPP}/src/llama-model-loader.cpp llama-model-loader.h)

# --- common: chat, jinja, grammars, sampling, speculative. Left out: network, processes, terminals, presets, and the
# argument parser; its log file starts a thread of its own (glue/common_log.cpp replaces it).
include(${LLAMA_CPP}/common/parsers/sources.cmake)
list(FILTER LLAMA_CHAT_PARSERS_SOURCES INCLUDE REGEX "\\.cpp$")
file(GLOB COMMON_SOURCES CONFIGURE_DEPENDS ${LLAMA_CPP}/common/*.cpp ${LLAMA_CPP}/common/jinja/*.cpp)
list(FILTER COMMON_SOURCES EXCLUDE REGEX "/(arg|console|download|hf-cache|log|preset|subproc)\\.cpp$")
add_library(llama_common STATIC ${COMMON_SOURCES} ${LLAMA_CHAT_PARSERS_SOURCES} ${PW_GENERATED}/build-info.cpp ${HERE}/glue/common_log.cpp
    ${HERE}/glue/jinja_depth.cpp)
target_compile_options(llama_common PRIVATE ${PW_SAFEPOINT_EDGES} "SHELL:-include ${HERE}/sysroot/forced/jinja_depth.h")
target_include_directories(llama_common PUBLIC ${LLAMA_CPP}/common)
target_include_directories(llama_common PRIVATE ${HERE}/sysroot)
target_link_libraries(llama_common PUBLIC pw_llama_headers)
pw_force_include(${LLAMA_CPP}/common/common.cpp common.h)

# --- mtmd: images and audio, no video (it would run ffmpeg) ---------------------------------------------------------
file(GLOB MTMD_SOURCES CONFIGURE_DEPENDS ${LLAMA_CPP}/tools/mtmd/models/*.cpp)
list(APPEND MTMD_SOURCES
    ${LLAMA_CPP}/tools/mtmd/mtmd.cpp ${LLAMA_CPP}/tools/mtmd/mtmd-audio.cpp ${LLAMA_CPP}/tools/mtmd/mtmd-image.cpp
    ${LLAMA_CPP}/tools/mtmd/mtmd-helper.cpp ${LLAMA_CPP}/tools/mtmd/mtmd-helper-gen.cpp ${LLAMA_CPP}/tools/mtmd/clip.cpp)
add_library(mtmd STATIC ${MTMD_SOURCES})
target_compile_options(mtmd PRIVATE ${PW_SAFEPOINT_EDGES})
target_compile_definitions(mtmd PRIVATE MA_NO_THREADING)
target_include_directories(mtmd PUBLIC ${LLAMA_CPP}/tools/mtmd)
target_link_libraries(mtmd PUBLIC pw_llama_headers)

# mtmd names its images by sha256. xxhash takes wasm SIMD for Arm's unless told.
set(HASH ${LLAMA_CPP}/vendor/hash)
add_library(vendor_hash STATIC ${HASH}/hash.cpp ${HASH}/sha1/sha1.c ${HASH}/sha256/sha256.c ${HASH}/xxhash/xxhash.c)
set_source_files_properties(${HASH}/sha1/sha1.c PROPERTIES LANGUAGE CXX)
set_source_files_properties(${HASH}/xxhash/xxhash.c PROPERTIES COMPILE_OPTIONS "-mno-relaxed-simd;-mno-simd128")
target_include_directories(vendor_hash PRIVATE ${HASH})
target_link_libraries(vendor_hash PRIVATE pw_llama_headers)
