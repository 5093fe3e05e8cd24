# CMake toolchain: clang, wasm-ld and ar of the ziglang wheel, for wasm32 with threads, exceptions and relaxed SIMD.
# PW_ZIG names the folder of the unpacked wheel.
set(CMAKE_SYSTEM_NAME Generic)
set(CMAKE_SYSTEM_PROCESSOR wasm32)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES PW_ZIG)

set(PW_ZIG_LIB ${PW_ZIG}/lib)

# CMake wants single programs; zig is one program with the tool as first argument.
set(_bin ${CMAKE_BINARY_DIR}/bin)
foreach(_tool clang clang++ ar ranlib wasm-ld)
    if(NOT EXISTS ${_bin}/${_tool})
        # -no-canonical-prefixes: clang names its own folder as it was called (build.sh tells why lengths matter).
        string(REPLACE "clang++" "clang --driver-mode=g++" _command ${_tool})
        string(REGEX REPLACE "^clang" "clang -no-canonical-prefixes" _command "${_command}")
        file(WRITE ${_bin}/${_tool} "#!/bin/sh\nexec '${PW_ZIG}/zig' ${_command} \"$@\"\n")
        file(CHMOD ${_bin}/${_tool} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
    endif()
endforeach()
set(CMAKE_C_COMPILER ${_bin}/clang)
set(CMAKE_ASM_COMPILER ${_bin}/clang)
set(CMAKE_CXX_COMPILER ${_bin}/clang++)
set(CMAKE_AR ${_bin}/ar)
set(CMAKE_RANLIB ${_bin}/ranlib)
set(PW_WASM_LD ${_bin}/wasm-ld)
foreach(_language C CXX ASM)
    set(CMAKE_${_language}_COMPILER_WORKS TRUE)
    set(CMAKE_${_language}_COMPILER_TARGET wasm32-wasip1)
endforeach()

# `ar D`: no dates and no owners in archives.
set(CMAKE_C_ARCHIVE_CREATE "<CMAKE_AR> crD <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_CREATE "<CMAKE_AR> crD <TARGET> <OBJECTS>")
set(CMAKE_C_ARCHIVE_APPEND "<CMAKE_AR> rD <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_APPEND "<CMAKE_AR> rD <TARGET> <OBJECTS>")
set(CMAKE_C_ARCHIVE_FINISH "<CMAKE_RANLIB> -D <TARGET>")
set(CMAKE_CXX_ARCHIVE_FINISH "<CMAKE_RANLIB> -D <TARGET>")
foreach(_language C CXX)
    set(CMAKE_${_language}_LINK_EXECUTABLE "${PW_WASM_LD} <LINK_FLAGS> <OBJECTS> <LINK_LIBRARIES> -o <TARGET>")
endforeach()
