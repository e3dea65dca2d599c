#!/usr/bin/env bash
# What needs a GPU, in under 8 minutes: the tests marked `gpu`, and training steps of Llama-3.2-1B's size in bfloat16
# against PEFT's prompt tuning, with peak memory. Writes to $OUT (default build/gpu).
#
#     examples/benchmarks/gpu.sh            # on a CUDA device
#     examples/benchmarks/gpu.sh cpu        # a tiny size on a CPU, to see that it runs
set -euo pipefail
cd "$(dirname "$0")/../.."
DEVICE=${1:-cuda}
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"

steps() {
    "$PYTHON" -W ignore examples/benchmarks/training_step.py --device "$DEVICE" --dtype bfloat16 --labels 2 \
        --methods "prompt tuning" "residual, not shared" "residual, shared" "residual, shared, logits at labels" \
        "$@" 2>>"$OUT/errors.txt" | tee -a "$OUT/steps.txt"
}

if [ "$DEVICE" = cpu ]; then
    steps --size tiny-llama --tokens 4 --length 8 --batch_size 2 --repeats 2 --memory False
    exit
fi

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$OUT/steps.txt"
"$PYTHON" -m pytest -q -m gpu -o addopts= 2>&1 | tee "$OUT/tests.txt"
for tokens in 20 100 200; do
    for sizes in "8 64" "8 256" "32 64" "32 256"; do
        read -r rows length <<<"$sizes"
        steps --size llama-3.2-1b --tokens "$tokens" --batch_size "$rows" --length "$length" --repeats 5 --memory False
    done
done
steps --size llama-3.2-1b --tokens 100 --batch_size 32 --length 64 --repeats 5
steps --size llama-3.2-1b --tokens 100 --batch_size 32 --length 64 --repeats 5 --memory False --compile True
