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
failed=0
for source in "${sources[@]}"; do
  echo "C++17 $source"
  errors=$("${CXX:-g++}" -std=c++17 -fmax-errors=0 -fsyntax-only -DTORCH_EXTENSION_NAME=_C -Icsrc "${flags[@]}" \
    "$source" 2>&1 | grep -E '^csrc/.*(error|warning):' || true)
  [[ -z $errors ]] || { echo "$errors" >&2; failed=1; }
done
exit $failed
