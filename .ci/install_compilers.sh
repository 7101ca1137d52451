#!/usr/bin/env bash
# Installs what the compiler checks need and this machine lacks. nvcc is not installed: it comes with
# the CUDA toolkit, and check_cuda.sh fails where it is missing.
set -euo pipefail

missing=()
command -v hipcc >/dev/null || missing+=(hipcc)
[[ -e /usr/include/hip/hip_runtime.h || -d /opt/rocm ]] || missing+=(libamdhip64-dev)
compgen -G '/usr/lib/*/amdgcn/bitcode/ocml.bc' >/dev/null || [[ -d /opt/rocm ]] ||
  missing+=(rocm-device-libs)

if ((${#missing[@]} == 0)); then
  echo "all here"
  exit 0
fi
as_root=()
[[ $(id -u) -eq 0 ]] || as_root=(sudo)
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
