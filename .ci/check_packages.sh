#!/usr/bin/env bash
# Builds the sdist from what is committed, a wheel from the sdist, installs the wheel into an
# environment of its own, and streams a model there without a compiler in reach.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
# For the kind of device that the checkout was built for.
built_for=$(sed -n 's/^BUILD: str = .\(.*\)./\1/p' blockswap/_build_info.py 2>/dev/null || true)
export BLOCKSWAP_BUILD=${BLOCKSWAP_BUILD:-${built_for:-auto}}

python=$(cd "$(dirname "$(command -v "$python")")" && pwd)/$(basename "$python")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/tree" "$work/dist"
git archive HEAD | tar -x -C "$work/tree"
(cd "$work/tree" && "$python" -c \
  "from setuptools import build_meta; build_meta.build_sdist('$work/dist')" >"$work/sdist.log" 2>&1) ||
  { tail -20 "$work/sdist.log"; exit 1; }
sdist=$(echo "$work"/dist/*.tar.gz)
BLOCKSWAP_LABEL=1 "$python" -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps --no-index \
  -w "$work/dist" "$sdist"
wheel=$(echo "$work"/dist/*.whl)
echo "$(basename "$sdist"), $(basename "$wheel")"

# Torch and the other requirements come from this interpreter's environment; blockswap does not.
"$python" -m venv "$work/venv"
"$python" -c "import site; print(*site.getsitepackages(), sep='\n')" \
  >"$(echo "$work"/venv/lib/python*/site-packages)/requirements.pth"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-index "$wheel"
cd "$work"
env -i PATH="$work/venv/bin" HOME="$work" LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}" PYTHONSAFEPATH=1 python - <<'PY'
import copy
import importlib.metadata
import sys
from pathlib import Path

import torch
from torch import nn

import blockswap

assert Path(blockswap.__file__).is_relative_to(sys.prefix), blockswap.__file__
label = importlib.metadata.version("blockswap")
assert f"+torch{'.'.join(torch.__version__.split('.')[:2])}." in label, label
assert not list(Path(blockswap.__file__).parent.rglob("*.cpp"))
block = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(6)]
model = nn.Sequential(*block).requires_grad_(False)
x = torch.randn(4, 64)
device = "cuda" if torch.cuda.is_available() else "cpu"
x = x.to(device)
expected = copy.deepcopy(model).to(device)(x)
with torch.no_grad(), blockswap.attach(model, device=device, offload=4) as session:
    outputs = [model(x) for _ in range(10)]
    assert session.report().streamed_bytes > 0
assert all(torch.equal(output, expected) for output in outputs)
print(f"blockswap {label} streams from a wheel on {device}")
PY
env -i PATH="$work/venv/bin" HOME="$work" LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}" blockswap version
