#!/usr/bin/env bash
# Tests the C++ kernels under the address and undefined-behaviour sanitizers, in a copy: the installed ones stay.
set -euo pipefail
cd "$(dirname "$0")/.."

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md LICENSE csrc kernels engine tests "$copy"
rm -f "$copy"/kernels/jepa_kernels/_C.*so
cd "$copy"

flags="-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
echo "sanitize: building csrc with $flags"
CC=gcc CXX=g++ CFLAGS=$flags CXXFLAGS=$flags python setup.py --quiet build_ext --inplace

# One op, one name: csrc/x.cpp is tested by test_x.py. Only the C++ is instrumented, so only its cases run.
tests=()
for source in $(grep -l LIBRARY_IMPL csrc/*.cpp); do
    test=$(find tests/kernels tests/data -name "test_$(basename "$source" .cpp).py")
    tests+=("${test:?$source has none}")
done

# Python itself is not instrumented: the sanitizers' libraries, and the one that throws, must be there before it.
libraries=$(ldd kernels/jepa_kernels/_C.abi3.so | awk '/lib(asan|ubsan|stdc\+\+)\.so/ { print $3 }')
env LD_PRELOAD="$(echo $libraries)" \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
    python -m pytest --capture=sys -p no:cacheprovider "${tests[@]}" \
    -k "not triton and (masks or not reference) and not compiles and not opcheck and not gpu and not ddp and not asserts"
echo "sanitize: no invalid access and no undefined behaviour in ${#tests[@]} files of tests"
