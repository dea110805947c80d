#!/usr/bin/env bash
# Correctness and speed of the Triton kernels on the GPU of this machine. No network. Under 9 minutes.
# Needs a Python with jax[cuda13], numpy and jaxtyping (PYTHON=...; default python3).
#   benchmarks/gpu.sh [OUT_DIR]             # OUT_DIR --smoke: tiny, interpreted, on a CPU
#   benchmarks/gpu.sh engine [OUT_DIR]      # the engine instead, beside transformers where it is there
# Each row is written as it comes, so that a run that is cut off has what it has. Run it again with
# the same OUT_DIR and it does what is missing. Exit status 1 where a result is wrong.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = engine ]; then
  for rows in 1 8 32; do # 128K tokens of prompts in each batch
    PYTHONPATH=$PWD "${PYTHON:-python3}" -m benchmarks.engine_speed --size 1b --dtype bfloat16 \
      --context 131072 --rows $rows --new-tokens 64 --out "${2:-build/gpu}/rows_$rows" || exit 1
  done
  exit
fi
python=${PYTHON:-python3} out=${1:-build/gpu} smoke=${2:-} begin=$(date +%s)
mkdir -p "$out"
# the CPU computes what is right
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 JAX_PLATFORMS=${smoke:+cpu}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
[ -n "$smoke" ] || nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.sm,memory.total --format=csv |
  tee "$out/nvidia-smi.csv"
# Each part ends so many seconds after the beginning, and has a process of its own: what it breaks
# is its own. First what is right.
for part in check-attention:140 check-decode:185 check-grouped:250 \
            time-attention:370 time-decode:430 time-grouped:510; do
  until=$((begin + ${part#*:}))
  for attempt in 1 2 3; do # a case that takes the process down is a row, and the next one goes on
    timeout --kill-after=5 $((until + 10 - $(date +%s)))s \
      "$python" -m benchmarks.gpu "$out" --parts "${part%:*}" --until "$until" $smoke
    status=$?
    [ $status -eq 0 ] || [ $status -eq 2 ] || [ $status -eq 124 ] && break
    [ "$(date +%s)" -ge "$until" ] && break
  done
  [ $status -eq 2 ] && exit 2
done
"$python" -m benchmarks.gpu "$out" --report
status=$?
cat "$out/report.md"
echo "written to $out: put report.md into benchmarks/results/, named by date and device"
exit $status
