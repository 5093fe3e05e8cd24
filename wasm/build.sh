#!/usr/bin/env bash
# Build wasm/llama.wasm and wasm/llama.wasm.json from what sources.lock pins. Needs python3 with pip, and 3 GB of disk.
#
#   wasm/build.sh                 fetch, generate the bindings, build, install the module into wasm/
#   wasm/build.sh --tests         ... and build upstream's own tests as wasm commands (build/wasm/tests)
#   wasm/build.sh --check         build twice, in two folders, and compare both with the committed module; install nothing
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
python=${PYTHON:-python3}

mode=install
tests=OFF
for argument in "$@"; do
    case $argument in
        --check) mode=check ;;
        --tests) tests=ON ;;
        *) sed -n '2,6p' "$0" >&2; exit 2 ;;
    esac
done

# configure_and_build ROOT TESTS [TARGET ...]: everything of one build lies under ROOT.
configure_and_build() {
    local root=$1 with_tests=$2
    shift 2
    "$python" wasm/fetch.py --root "$root" --downloads "$repo/build/downloads"
    local cmake=$root/toolchain/cmake/bin/cmake ninja=$root/toolchain/ninja/ninja
    "$cmake" -S "$repo/wasm" -B "$root/wasm" -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" \
        -DCMAKE_TOOLCHAIN_FILE="$repo/wasm/toolchain.cmake" -DPW_ROOT="$root" -DPW_ZIG="$root/toolchain/zig" \
        -DPW_TESTS="$with_tests" --log-level=WARNING
    NINJA_STATUS="[%f/%t %es] " "$ninja" -C "$root/wasm" "$@"
}

check_bindings() {
    "$python" wasm/abi/generate.py --check --llama-cpp "$1/sources/llama.cpp" --zig "$1/toolchain/zig/zig"
}

if [ "$mode" = check ]; then
    configure_and_build "$repo/build" "$tests"
    check_bindings "$repo/build"
    second=$(mktemp -d)/elsewhere
    trap 'rm -rf "$(dirname "$second")"' EXIT
    configure_and_build "$second" OFF
    "$python" wasm/manifest.py --compare wasm/llama.wasm "$repo/build/wasm/llama.wasm" "$second/wasm/llama.wasm"
else
    "$python" wasm/fetch.py
    "$python" wasm/abi/generate.py --llama-cpp build/sources/llama.cpp --zig build/toolchain/zig/zig
    configure_and_build "$repo/build" "$tests"
    "$python" wasm/manifest.py --install build/wasm/llama.wasm
fi
