#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in one call. What it runs is named on the command
# line, in this order; results go to $OUT (default: benchmarks/results). What a "/" parts runs at
# once, each part on a GPU and processor cores of its own:
#
#   benchmarks/on_gpu.sh bench:qwen / bench:wan:6 bench:sdxl
#
#   benchmarks/on_gpu.sh tests[:"a or b"]      pytest -m gpu, all or those named
#   benchmarks/on_gpu.sh multi                 pytest -m multi_gpu
#   benchmarks/on_gpu.sh models:flux[:0,3]     benchmarks/models.py, all cases or those numbers
#   benchmarks/on_gpu.sh host                   what streaming costs the host per piece
#   benchmarks/on_gpu.sh allocator[:flux,sdxl] the caching pool beside PyTorch's allocator: steps that are
#                                              made up, or recorded forwards of these models
#   benchmarks/on_gpu.sh attach                time and host memory of attaching
#   benchmarks/on_gpu.sh sanitize[:"a or b"]   the GPU tests under compute-sanitizer memcheck
#   benchmarks/on_gpu.sh bench:flux[:20]       engines side by side, so many timed steps
#   benchmarks/on_gpu.sh profile:flux          plans from a profile against steps at ten caps
#   benchmarks/on_gpu.sh probe                 what each link carries
#   benchmarks/on_gpu.sh packages              sdist, wheel, and a model streamed from the wheel
#   benchmarks/on_gpu.sh demo                  make demo
#   benchmarks/on_gpu.sh pipeline:flux         a full-size pipeline, unswapped and streamed: the same picture
#   benchmarks/on_gpu.sh pipelines:flux,wan22[:expandable_segments:True]
#                                              whole calls under one cap against the least they can take;
#                                              PyTorch's allocator with those settings
#   benchmarks/on_gpu.sh caps:flux[:0,12[:2]]  a model under twelve caps and the smallest, or those
#                                              numbers; so many timed steps
#   benchmarks/on_gpu.sh decode[:0,12]         SDXL with VAE decode under twelve caps and the smallest, or those numbers
#   benchmarks/on_gpu.sh contention            what a busy link costs the host
#   benchmarks/on_gpu.sh neighbour             a session beside a program that takes and returns memory
#   benchmarks/on_gpu.sh modes[:profiles]      Qwen-Image: profiles, and modes with their lowest caps
#   benchmarks/on_gpu.sh hostmem               FLUX with a quarter of its weights pinned
#   benchmarks/on_gpu.sh install:flux          PyTorch on the caching pool, and a burst that sheds
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD:${PYTHONPATH:-}"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-' | sed 's/nvidia-//')
stamp="$gpu-$(date +%F)"
failed=0
say() { printf '\n== %s (%ss) ==\n' "$1" "$SECONDS"; }
# What hangs dies after so many seconds and says where each thread was.
limited() { PYTHONFAULTHANDLER=1 timeout -s ABRT -k 10 "$@"; }
# No rates, no full-size models, no compiler: under the tool a kernel takes some hundred times as
# long. No backtraces either: with them the tool keeps every Python frame, and so every tensor,
# alive. Nor what asks the driver about a destroyed stream: under the tool that ends the process.
# Several processes side by side, for nothing is timed; but what reads how much of the GPU is free runs
# alone, and where that means to find no memory, cudaMalloc saying so is no error.
sanitize() {
  local chosen="not full and not throttled and not flex and not bench and not destroyed_stream"
  chosen+="${1:+ and (${1#:})}"
  local alone="gives_memory_back_to_the_device or give_back_lowers_used_memory or leave_no_room"
  local shards=${SANITIZE_SHARDS:-4} shard=0 failed=0 job test
  local -a jobs=()
  list_tests "($chosen) and ($alone)" >"$OUT/sanitizer-alone.txt"
  rm -f "$OUT"/sanitizer-[0-9]*.txt
  while read -r test; do
    echo "$test" >>"$OUT/sanitizer-$((shard++ % shards)).txt"
  done < <(list_tests "($chosen) and not ($alone)")
  for test in "$OUT"/sanitizer-[0-9]*.txt; do
    memcheck "$test" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  [[ ! -s $OUT/sanitizer-alone.txt ]] || memcheck "$OUT/sanitizer-alone.txt" --report-api-errors no || failed=1
  cat "$OUT"/sanitizer-*.log | grep -E "^tests/.* (PASSED|FAILED|ERROR)|ERROR SUMMARY|^FAILED" |
    tee "$OUT/$stamp-sanitizer.txt" | grep -vE "PASSED"
  return $failed
}
list_tests() { $PYTHON -m pytest -q --collect-only -m gpu tests/gpu -k "$1" | grep ::; }
memcheck() {
  local tests=$1
  # Under the tool the host waits where it does not otherwise: tests do not ask whether it did.
  BLOCKSWAP_UNDER_MEMCHECK=1 limited "${SANITIZE_S:-500}" \
    compute-sanitizer --tool memcheck --show-backtrace no --error-exitcode 9 "${@:2}" \
    $PYTHON -m pytest -v --durations=10 -m gpu "@$tests" >"${tests%.txt}.log" 2>&1
}

say build
if ! $PYTHON setup.py -q build_ext --inplace >build-gpu.log 2>&1; then
  grep -m 40 -A 8 -E 'error|FAILED' build-gpu.log || tail -40 build-gpu.log
  exit 1
fi
measure() {
  local failed=0 what named models settings cases traces model steps demo numbers part
  for what in "$@"; do
    say "$what"
    case $what in
      tests | tests:*)
        named=${what#tests} named=${named#:}
        limited "${TESTS_S:-400}" $PYTHON -m pytest -q --maxfail=8 --durations=12 -m gpu ${named:+-k "$named"} tests/gpu tests/test_ops.py ||
          failed=1 ;;
      multi) # all GPUs, of which a part sees only its own
        (unset CUDA_VISIBLE_DEVICES && limited 260 $PYTHON -m pytest -q -m multi_gpu tests) || failed=1 ;;
      models:*)
        IFS=: read -r _ models cases <<<"$what"
        limited "${MODELS_S:-400}" $PYTHON -m benchmarks.models --models "$models" --cases "${cases:-}" \
          --out "$OUT/$stamp-${models//,/-}${cases:+-$(tr , _ <<<"$cases")}-core.json" || failed=1 ;;
      touch:*) $PYTHON -c "from benchmarks.turns import touch_memory; touch_memory(${what#touch:})" ;;
      host) limited 120 $PYTHON -m benchmarks.host_cost --out "$OUT/$stamp-host.json" || failed=1 ;;
      allocator | allocator:*)
        traces=${what#allocator} traces=${traces#:}
        limited "${ALLOCATOR_S:-150}" $PYTHON -m benchmarks.allocator --trace "${traces:-made-up}" \
          --out "$OUT/$stamp${traces:+-${traces//,/-}}-allocator.json" || failed=1 ;;
      attach) limited 200 $PYTHON -m benchmarks.attach ${ATTACH_OPTIONS:-} --out "$OUT/$stamp-attach.json" || failed=1 ;;
      sanitize | sanitize:*) sanitize "${what#sanitize}" || failed=1 ;;
      bench:*)
        IFS=: read -r _ model steps <<<"$what"
        limited "${BENCH_S:-560}" $PYTHON -m blockswap bench --model "$model" --steps "${steps:-20}" \
          --out "$OUT/$stamp-$model-bench.json" --picture "$OUT/$model-bench.png" || failed=1 ;;
      profile:*)
        limited 300 $PYTHON -m benchmarks.profiles --model "${what#profile:}" \
          --out "$OUT/$stamp-${what#profile:}-profile.json" || failed=1 ;;
      probe) limited 120 $PYTHON -m blockswap probe --out "$OUT/$stamp-probe.json" --picture "$OUT/probe.png" || failed=1 ;;
      packages) PYTHON="$PYTHON" .ci/check_packages.sh || failed=1 ;;
      pipeline:*)
        demo=$(mktemp -d)
        limited 200 $PYTHON -m blockswap demo --model "${what#pipeline:}" --size full --out "$demo" || failed=1
        cp "$demo/report.json" "$OUT/$stamp-${what#pipeline:}-pipeline.json"
        cp "$demo/timeline.png" "$OUT/${what#pipeline:}-timeline.png"
        rm -rf "$demo" ;;
      pipelines:*)
        IFS=: read -r _ models settings <<<"$what"
        limited "${PIPELINES_S:-400}" env ${settings:+"PYTORCH_CUDA_ALLOC_CONF=$settings"} \
          $PYTHON -m benchmarks.pipelines --models "$models" \
          --out "$OUT/$stamp-$(tr , _ <<<"$models")${settings:+-${settings%%:*}}-pipelines.json" || failed=1 ;;
      caps:*)
        IFS=: read -r _ model numbers steps <<<"$what"
        limited "${CAPS_S:-500}" $PYTHON -m benchmarks.cap_sweep --model "$model" --numbers "${numbers:-}" \
          --steps "${steps:-20}" \
          --out "$OUT/$stamp-$model${numbers:+-$(tr , _ <<<"$numbers")}-cap-sweep.json" || failed=1 ;;
      decode | decode:*)
        numbers=${what#decode} numbers=${numbers#:}
        limited "${DECODE_S:-400}" $PYTHON -m benchmarks.decode --numbers "$numbers" \
          --out "$OUT/$stamp-sdxl${numbers:+-$(tr , _ <<<"$numbers")}-cap-sweep.json" || failed=1 ;;
      contention) limited 60 $PYTHON -m benchmarks.contention --out "$OUT/$stamp-contention.json" || failed=1 ;;
      neighbour) limited 200 $PYTHON -m benchmarks.neighbour --out "$OUT/$stamp-neighbour.json" || failed=1 ;;
      modes | modes:*)
        part=${what#modes} part=${part#:}
        limited "${MODES_S:-450}" $PYTHON -m benchmarks.modes --part "$part" \
          --out "$OUT/$stamp-qwen${part:+-$part}-modes.json" || failed=1 ;;
      hostmem) limited 200 $PYTHON -m benchmarks.host_memory --out "$OUT/$stamp-host-memory.json" || failed=1 ;;
      install:*)
        limited "${INSTALL_S:-300}" $PYTHON -m benchmarks.pluggable --model "${what#install:}" \
          --out "$OUT/$stamp-${what#install:}-install.json" || failed=1 ;;
      demo) timeout 100 make demo PYTHON="$PYTHON" || failed=1 ;;
      *) echo "unknown: $what"; failed=1 ;;
    esac
  done
  return $failed
}
# One part on one GPU, with its share of the cores; what it says is shown when all are done. Threads
# of one core stay together.
lane() {
  local number=$1 share=$(($(nproc) / $2))
  local -a cores
  mapfile -t cores < <(lscpu -p=NODE,CORE,CPU | grep -v '^#' | sort -t, -n -k1,1 -k2,2 -k3,3 | cut -d, -f3 |
    grep -xFf <($PYTHON -c 'import os; print(*os.sched_getaffinity(0), sep="\n")'))
  export CUDA_VISIBLE_DEVICES=$number
  taskset -cp "$(IFS=,; echo "${cores[*]:number * share:share}")" $BASHPID >/dev/null
  measure "${@:3}" >"$OUT/lane-$number.log" 2>&1
}

parts=1
for what in "$@"; do [[ $what != / ]] || parts=$((parts + 1)); done
if ((parts == 1)); then
  measure "$@" || failed=1
else
  lanes=() part=()
  for what in "$@" /; do
    if [[ $what != / ]]; then
      part+=("$what")
      continue
    fi
    lane ${#lanes[@]} "$parts" "${part[@]}" &
    lanes+=($!) part=()
  done
  for job in "${lanes[@]}"; do wait "$job" || failed=1; done
  cat "$OUT"/lane-*.log
fi
say "done, failed=$failed"
exit $failed
