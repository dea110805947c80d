#!/usr/bin/env bash
# Correctness and speed of the Triton kernels on the GPU of this machine. No network.
# Needs a Python with jax[cuda13], numpy and jaxtyping (PYTHON=...; default python3).
#   benchmarks/gpu.sh [OUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${1:-build/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.sm,memory.total --format=csv |
  tee "$out/nvidia-smi.csv"
# First what is right, so that a long run that is cut off has said it.
"$python" benchmarks/gpu_attention.py --check-only --out "$out/check"
"$python" benchmarks/gpu_attention.py --out "$out/attention"
echo "written to $out: put report.md and report.json into benchmarks/results/, named by date and device"
