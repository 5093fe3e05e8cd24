#!/bin/sh
# Builds the native peer of the module: the same llama.cpp sources, compiled for this machine.
#
#   tests/parity/native/build.sh          AVX2, FMA, F16C: what upstream ships for x86-64; golden files come from this one
#   tests/parity/native/build.sh native   -march=native, to see how far one native build is from another
#   tests/parity/native/build.sh native-blas   -march=native with OpenBLAS for prefill, for bench/
#   tests/parity/native/build.sh VARIANT TARGET...   these programs only
#
# Needs a C++ compiler, cmake and the sources that `make wasm` (or `wasm/build.sh --fetch`) lays in build/sources;
# native-blas also pip, which brings OpenBLAS (openblas.txt).
# Environment: LLAMA_CPP (other sources), JOBS (parallel compilers, default: all processors).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
sources=${LLAMA_CPP:-$root/build/sources/llama.cpp}
variant=${1:-portable}

case $variant in
    portable) native_flag=OFF ;;
    native | native-blas) native_flag=ON ;;
    *) echo "build native peer: unknown variant $variant (portable, native or native-blas)" >&2; exit 2 ;;
esac
if [ ! -f "$sources/include/llama.h" ]; then
    echo "build native peer: no llama.cpp sources in $sources (run wasm/build.sh --fetch)" >&2
    exit 1
fi

PATH="$root/.venv/bin:$PATH"
out=$root/build/native/$variant
if [ $# -gt 0 ]; then shift; fi
programs=${*:-dump_logits dump_detokenize dump_architectures dump_file_logits dump_sampling dump_backend_sampling dump_contexts native_quantize}
openblas=
if [ "$variant" = native-blas ]; then
    # A library and its headers in one pinned wheel; nothing is installed.
    openblas=$root/build/sources/openblas/scipy_openblas32
    if ! cmp -s "$here/openblas.txt" "$openblas/../.installed"; then
        "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
            --upgrade --target "$root/build/sources/openblas" --requirement "$here/openblas.txt"
        cp "$here/openblas.txt" "$openblas/../.installed"
    fi
    programs=${*:-bench_native}
fi
generator="Unix Makefiles"
if command -v ninja > /dev/null; then generator=Ninja; fi

# The instruction sets are named, not left to upstream's defaults: those depend on how GGML_NATIVE was set.
x86=$([ "$native_flag" = OFF ] && echo ON || echo OFF)
mkdir -p "$out"
cmake -S "$here" -B "$out" -G "$generator" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP="$sources" \
    -DGGML_NATIVE=$native_flag -DGGML_SSE42="$x86" -DGGML_AVX="$x86" -DGGML_AVX2="$x86" -DGGML_BMI2="$x86" \
    -DGGML_FMA="$x86" -DGGML_F16C="$x86" -DOPENBLAS="$openblas" > "$out.log" 2>&1 || { cat "$out.log" >&2; exit 1; }
# shellcheck disable=SC2086  # a list of names
cmake --build "$out" --target $programs -j "${JOBS:-$(getconf _NPROCESSORS_ONLN)}"
echo "native peer: $out"
