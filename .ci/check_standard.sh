#!/usr/bin/env bash
# PyTorch 2.11 builds extensions as C++17, the one that is installed here as C++20: what our sources
# take from the newer standard would fail only there. Its own headers may need the newer one.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
mapfile -t flags < <("$python" - <<'PYTHON'
import sysconfig
from torch.utils.cpp_extension import include_paths
for path in [*include_paths("cpu"), sysconfig.get_path("include")]:
    print(f"-isystem{path}")
PYTHON
)
# The others are compiled as C++17 under the sanitizers.
mapfile -t sources < <(grep -rlE 'ATen/|c10/|torch/|pybind11/|binding\.h|bindings\.h|watched\.h' csrc \
  --include='*.cpp' --exclude='*_hip.cpp' --exclude='hip.cpp' --exclude='hip_*.cpp' | sort)
((${#sources[@]} > 0)) || { echo "no sources found" >&2; exit 1; }
cxx=${CXX:-g++}
command -v "$cxx" >/dev/null || { echo "$cxx is missing: this check does not skip" >&2; exit 1; }
# What is wrong in our files alone; a compiler that fails in another way is wrong, too.
errors_in() {
  local said
  said=$("$cxx" -std=c++17 -fmax-errors=0 -fsyntax-only -DTORCH_EXTENSION_NAME=_C -Icsrc "${flags[@]}" "$1" 2>&1)
  grep -E '^csrc/.*(error|warning):|fatal error:|internal compiler error|Killed' <<<"$said"
}

planted=$(mktemp csrc/planted_XXXX.cpp)
trap 'rm -f "$planted"' EXIT
printf '#include "binding.h"\nauto planted = std::make_unique_for_overwrite<char[]>(1);\n' >"$planted"
errors_in "$planted" >/dev/null || { echo "this check finds nothing: a planted line passed" >&2; exit 1; }
rm "$planted"

failed=0
for source in "${sources[@]}"; do
  echo "C++17 $source"
  if errors_in "$source" >&2; then failed=1; fi
done
exit $failed
