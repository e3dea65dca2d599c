#!/usr/bin/env bash
# What needs a GPU, in under 8 minutes: the tests marked `gpu`, training steps of Llama-3.2-1B's size in bfloat16
# against PEFT's prompt tuning, with peak memory, and one network per virtual token. Writes to $OUT (default build/gpu).
#
#     examples/benchmarks/gpu.sh            # on a CUDA device
#     examples/benchmarks/gpu.sh cpu        # a tiny size on a CPU, to see that it runs
set -euo pipefail
cd "$(dirname "$0")/../.."
DEVICE=${1:-cuda}
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"

bench() {
    local script=$1
    "$PYTHON" -W ignore "examples/benchmarks/$script.py" --device "$DEVICE" "${@:2}" 2>>"$OUT/errors.txt" |
        tee -a "$OUT/$script.txt"
}

if [ "$DEVICE" = cpu ]; then
    bench gpu_steps --size tiny-llama --repeats 2 --prompts 4 --lengths 8 --batch_sizes 2
    exit
fi

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$OUT/card.txt"
"$PYTHON" -m pytest -q -m gpu -o addopts= tests/test_gpu.py 2>&1 | tee "$OUT/tests.txt" || true
bench gpu_steps --repeats 7
bench encoder --repeats 30
bench gpu_steps --repeats 7 --prompts 100 --lengths 64 --batch_sizes 32 --compile True \
    --methods "prompt tuning" "residual, shared, logits at labels"
