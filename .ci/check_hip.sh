#!/usr/bin/env bash
# Translates the CUDA sources with torch's hipify and compiles the result for AMD GPUs with hipcc:
# gfx90a has waves of 64 threads, gfx1030 of 32. Needs no AMD GPU and no ROCm build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v hipcc >/dev/null || { echo "hipcc is missing: this check does not skip" >&2; exit 1; }
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r csrc "$work/csrc"
find "$work" \( -name '*_hip.*' -o -name 'hip.*' -o -name 'hip_*' -o -name '*.hip' \) -delete
"$python" - "$work" >"$work/sources" <<'PYTHON'
import contextlib
import sys
from pathlib import Path

from torch.utils.hipify import hipify_python

work = sys.argv[1]
csrc = Path(work, "csrc")
sources = sorted([*csrc.glob("device/cuda*.cpp"), *csrc.rglob("*.cu")])
with contextlib.redirect_stdout(sys.stderr):
    results = hipify_python.hipify(
        project_directory=work,
        output_directory=work,
        includes=[f"{work}/csrc/*"],
        extra_files=[str(source) for source in sources],
        show_detailed=False,
        is_pytorch_extension=True,
        hipify_extra_files_only=True,
    )
for source in sources:
    result = results[str(source)]
    if result.hipified_path is None or result.hipified_path == str(source):
        sys.exit(f"hipify left {source.relative_to(work)} as it is")
    print(result.hipified_path)
PYTHON
[[ -s "$work/sources" ]] || { echo "no CUDA sources found" >&2; exit 1; }

# Without HIP_PLATFORM hipcc hands everything to an nvcc on the path.
export HIP_PLATFORM=amd
while read -r source; do
  for arch in gfx90a gfx1030; do
    echo "hipcc $arch ${source#"$work"/}"
    hipcc -x hip -std=c++17 --offload-arch="$arch" -DBS_WITH_GPU=1 -DUSE_ROCM=1 -I"$work/csrc" \
      -Wall -Wextra -Werror -c "$source" -o "$work/out.o"
  done
done <"$work/sources"
