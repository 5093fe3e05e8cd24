#!/usr/bin/env bash
# Build wasm/llama.wasm and wasm/llama.wasm.json from what sources.lock pins. Needs python3 with pip, and 3 GB of disk.
#
#   wasm/build.sh                 fetch, generate the bindings, build, install the module into wasm/
#   wasm/build.sh --tests         ... and build upstream's own tests as wasm commands (build/wasm/tests)
#   wasm/build.sh --check         build twice, in two folders, and compare both with the committed module; install nothing
#   wasm/build.sh --stock         build it with upstream's kernels, to measure against: build/wasm-stock; install nothing
#   wasm/build.sh --fuzz          build it with counters of the edges it takes, for `make fuzz`: build/wasm-fuzz; install nothing
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
python=${PYTHON:-python3}

mode=install
tests=OFF
for argument in "$@"; do
    case $argument in
        --check) mode=check ;;
        --stock) mode=stock ;;
        --fuzz) mode=fuzz ;;
        --tests) tests=ON ;;
        *) sed -n '2,8p' "$0" >&2; exit 2 ;;
    esac
done

# clang 22 orders some landing pads by their address (LLVM issue 204883), and the length of every path it keeps decides what
# lies at which address. So all builds see their files under names of one length, whatever the folder they are in.
even_path() {
    local link=/tmp/pyllama-wasm-build-$(printf '%s' "$1" | sha256sum | cut -c1-12)
    mkdir -p -m 700 "$link"
    [ -O "$link" ] || { echo "$link belongs to somebody else" >&2; exit 1; }
    ln -sfn "$1" "$link/root"
    ln -sfn "$repo/wasm" "$link/wasm"
    ln -sfn "$repo/tests" "$link/tests"
    echo "$link"
}

# configure_and_build ROOT TESTS [stock|fuzz]: everything of one build lies under ROOT.
configure_and_build() {
    local with_tests=$2 variant=${3:-} out=wasm${3:+-$3} targets=() stock=OFF fuzz=OFF
    if [ -n "$variant" ]; then targets=(llama.wasm); fi
    if [ "$variant" = stock ]; then stock=ON; fi
    if [ "$variant" = fuzz ]; then fuzz=ON; fi
    "$python" wasm/fetch.py --root "$1" --downloads "$repo/build/downloads"
    local link
    link=$(even_path "$1")
    local root=$link/root
    local cmake=$root/toolchain/cmake/bin/cmake ninja=$root/toolchain/ninja/ninja
    "$cmake" -S "$link/wasm" -B "$root/$out" -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" \
        -DCMAKE_TOOLCHAIN_FILE="$link/wasm/toolchain.cmake" -DPW_ROOT="$root" -DPW_ZIG="$root/toolchain/zig" \
        -DPW_TESTS="$with_tests" -DPW_STOCK_KERNELS="$stock" -DPW_FUZZ="$fuzz" --log-level=WARNING
    # clang takes the working folder's name from PWD where that is true.
    env -C "$root/$out" PWD="$root/$out" NINJA_STATUS="[%f/%t %es] " "$ninja" "${targets[@]}"
}

check_bindings() {
    "$python" wasm/abi/generate.py --check --llama-cpp "$1/sources/llama.cpp" --zig "$1/toolchain/zig/zig"
}

if [ "$mode" = check ]; then
    configure_and_build "$repo/build" "$tests"
    check_bindings "$repo/build"
    second=$(mktemp -d)/a-folder-whose-name-is-a-good-deal-longer-than-the-first
    trap 'rm -rf "$(dirname "$second")"' EXIT
    configure_and_build "$second" OFF
    "$python" wasm/manifest.py --compare wasm/llama.wasm "$repo/build/wasm/llama.wasm" "$second/wasm/llama.wasm"
elif [ "$mode" = stock ] || [ "$mode" = fuzz ]; then
    configure_and_build "$repo/build" OFF "$mode"
else
    "$python" wasm/fetch.py
    "$python" wasm/abi/generate.py --llama-cpp build/sources/llama.cpp --zig build/toolchain/zig/zig
    configure_and_build "$repo/build" "$tests"
    "$python" wasm/manifest.py --install build/wasm/llama.wasm
fi
