#!/usr/bin/env bash
# Runs every tests/cpp/*_test.cpp, a program of its own that returns 0, against the C++ sources that
# need no torch: once under AddressSanitizer and UBSan as C++17, once under ThreadSanitizer as C++20.
# One test alone: .ci/check_sanitizers.sh engine
set -euo pipefail
cd "$(dirname "$0")/.."

cxx=${CXX:-g++}
jobs=${MAX_JOBS:-$(nproc)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mapfile -t sources < <("${PYTHON:-python3}" .ci/check_tree.py --torch-free)
mapfile -t tests < <(find tests/cpp -name "${1:-*}_test.cpp" 2>/dev/null | sort)
((${#tests[@]} > 0)) || { echo "no tests/cpp/${1:-*}_test.cpp found" >&2; exit 1; }

# ThreadSanitizer's shadow memory dislikes some address layouts.
steady=()
if setarch -R true 2>/dev/null; then steady=(setarch -R); fi

check() {
  local name=$1 flags=$2
  local out="$work/$name"
  mkdir -p "$out"
  printf '%s\n' "${sources[@]}" "${tests[@]}" | xargs -P "$jobs" -I {} bash -c '
    object=$1/$(tr / _ <<<"$2").o
    $3 $4 -O1 -g1 -fno-omit-frame-pointer -Wall -Wextra -Werror -Icsrc -c "$2" -o "$object"
  ' _ "$out" {} "$cxx" "$flags"
  # An archive: a test links what it uses, so a source that needs more does not stand in its way.
  ar rcs "$out/torch_free.a" "$out"/csrc_*.o
  for test in "${tests[@]}"; do
    local program="$out/$(basename "$test" .cpp)"
    # shellcheck disable=SC2086
    "$cxx" $flags "$out/$(tr / _ <<<"$test").o" "$out/torch_free.a" -pthread -o "$program"
    echo "$name $(basename "$test")"
    BLOCKSWAP_CHECK=1 ${steady[@]+"${steady[@]}"} "$program"
  done
}

export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
check address "-std=c++17 -fsanitize=address,undefined -fno-sanitize-recover=all"
check thread "-std=c++20 -fsanitize=thread"
