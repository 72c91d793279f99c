#!/usr/bin/env bash
# What only a GPU can tell, in one go: the CUDA tests, compute-sanitizer over the C++ test program,
# and measured times. About half an hour; with --minutes what fits into N of them (9), in order of
# importance: benchmarks/gpu_minutes.py says what, and its --dry-run does it on the CPU, small.
#
#   benchmarks/gpu_check.sh [--dry-run] [FOLDER]
#   benchmarks/gpu_check.sh --minutes [N] [--dry-run] [--output FOLDER]
#
# Run it from an environment with a CUDA build of torch and "pip install -e .[dev]". Logs go to
# FOLDER (gpu_check). A missing tool skips its step with a sentence. The exit code is 1 where a step
# failed, 2 where none failed but one was skipped, 77 without a GPU. --dry-run shows the commands,
# and runs none.
set -uo pipefail

if [ "${1:-}" = --minutes ]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
  exec "${PYTHON:-python}" -m benchmarks.gpu_minutes "$@"
fi

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
folder=${1:-gpu_check}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python}
failed=()
skipped=()

# step NAME COMMAND...: run it, keep what it prints in FOLDER/NAME.log, note how it ended.
step() {
  local name=$1
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  [ -z "$dry_run" ] || return 0
  "$@" 2>&1 | tee "$folder/$name.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed+=("$name (exit code $status)")
  return "$status"
}

skip() {
  printf '\n== %s: skipped, %s\n' "$1" "$2"
  skipped+=("$1")
}

has() { command -v "$1" >/dev/null; }

if ! has "$python"; then
  echo "gpu_check: $python was not found; activate an environment or set PYTHON"
  exit 1
fi
[ -n "$dry_run" ] || mkdir -p "$folder"

# ---- the machine ---------------------------------------------------------------------------------
if has nvidia-smi; then
  step gpu nvidia-smi
  step clocks nvidia-smi --query-gpu=name,compute_cap,clocks.max.sm,clocks.max.mem --format=csv
else
  skip gpu "nvidia-smi was not found"
fi
step environment "$python" -m tta_ext.env

if [ -z "$dry_run" ] &&
  ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: torch sees no CUDA device; nothing more can be checked here"
  exit 77
fi

# ---- operators through torch ---------------------------------------------------------------------
export TTA_EXT_REQUIRE=native,cuda TTA_EXT_CUDA=1
step tests "$python" -m pytest -q -m requires_cuda tests
step doctor "$python" -m tta_ext.cli doctor

# ---- kernels without torch, under compute-sanitizer ----------------------------------------------
build=$folder/build
if ! has cmake || ! has nvcc; then
  skip kernels "cmake or nvcc was not found"
else
  capability='import torch; print("%d%d" % torch.cuda.get_device_capability())'
  arch=$("$python" -c "$capability" 2>/dev/null)
  if step configure cmake -S . -B "$build" -DTTA_EXT_CUDA=on \
    "-DCMAKE_CUDA_ARCHITECTURES=${arch:-native}" &&
    step compile cmake --build "$build" --target kernels_test --parallel; then
    step kernels "$build/kernels_test" all --repetitions 50 --vocab 140000
    if has compute-sanitizer; then
      for tool in memcheck racecheck initcheck synccheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
          "$build/kernels_test" all --repetitions 3 --vocab 20000
      done
    else
      skip sanitizer "compute-sanitizer was not found (it is part of the CUDA toolkit)"
    fi
  fi
fi

# ---- times ---------------------------------------------------------------------------------------
step times "$python" -m benchmarks.gpu_times --output "$folder/gpu_times.md"

printf '\n== summary\n'
[ ${#skipped[@]} -eq 0 ] || printf 'skipped: %s\n' "${skipped[@]}"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "nothing failed${dry_run:+ (dry run)}"
if [ ${#skipped[@]} -gt 0 ] && [ -z "$dry_run" ]; then
  echo "but not everything was checked"
  exit 2
fi
