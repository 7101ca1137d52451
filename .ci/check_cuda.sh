#!/usr/bin/env bash
# Compiles the CUDA sources, without a GPU and without a CUDA build of torch:
#   runtime sources (csrc/device/cuda*.cpp) and kernels (*.cu) for real, with nvcc;
#   sources that see torch and CUDA headers, or have a part under BS_WITH_GPU, as a syntax check.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
command -v "$nvcc" >/dev/null || { echo "nvcc is missing: this check does not skip" >&2; exit 1; }
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mapfile -t sources < <(find csrc \( -path 'csrc/device/cuda*.cpp' -o -name '*.cu' \) | sort)
((${#sources[@]} > 0)) || { echo "no CUDA sources found" >&2; exit 1; }
for source in "${sources[@]}"; do
  for arch in sm_80 sm_90; do
    echo "nvcc $arch $source"
    "$nvcc" -x cu -arch="$arch" -std=c++17 -DBS_WITH_GPU=1 -Icsrc -Werror all-warnings \
      -Xcompiler -Wall,-Wextra,-Werror -c "$source" -o "$work/out.o"
  done
done

# CPU builds of torch carry the c10/cuda headers, but not these two, which its own build writes.
mkdir -p "$work/include/c10/cuda/impl" "$work/include/ATen/cuda"
echo '#pragma once' >"$work/include/c10/cuda/impl/cuda_cmake_macros.h"
printf '#pragma once\n#define AT_CUDNN_ENABLED() 0\n#define AT_ROCM_ENABLED() 0\n' \
  >"$work/include/ATen/cuda/CUDAConfig.h"
# nvcc may be a script that stands elsewhere: it knows where its headers are.
echo '#include <cuda_runtime_api.h>' >"$work/where.cu"
header=$("$nvcc" -M "$work/where.cu" | grep -o '[^ ]*/cuda_runtime_api\.h' | head -n 1)
cuda_include=$(dirname "$header")
mapfile -t flags < <("$python" - <<'PYTHON'
import sysconfig
from torch.utils.cpp_extension import include_paths
for path in [*include_paths("cpu"), sysconfig.get_path("include")]:
    print(f"-isystem{path}")
PYTHON
)
mapfile -t mixed < <(grep -rlE 'c10/cuda|ATen/cuda|BS_WITH_GPU' csrc --include='*.cpp' \
  --exclude='*_hip.cpp' --exclude='hip.cpp' --exclude='hip_*.cpp' --exclude='cuda*.cpp' | sort)
for source in ${mixed[@]+"${mixed[@]}"}; do
  echo "syntax with CUDA $source"
  "${CXX:-g++}" -std=c++20 -fsyntax-only -DBS_WITH_GPU=1 -DTORCH_EXTENSION_NAME=_C -Icsrc \
    -isystem "$work/include" "${flags[@]}" -isystem "$cuda_include" -Wall -Wextra -Werror "$source"
done
