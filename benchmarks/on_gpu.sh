#!/usr/bin/env bash
# Everything a machine with a GPU should show, in one call: correctness first, then speed.
#
#   benchmarks/on_gpu.sh [RESULTS] [CIFAR10]
#
# RESULTS: where the JSON files go (default: benchmarks/results). CIFAR10: a folder or archive; with
# it, the cifar10 preset is trained for 100 epochs as well (kNN accuracy and time).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$results"

"$python" -m sacl_fast doctor
"$python" -m pytest -q -m gpu tests

"$python" benchmarks/bench_xcorr_loss.py --seconds 0.3 \
  --json "$results/xcorr_loss_gpu.json" --plot "$results/xcorr_loss_gpu.png"
"$python" benchmarks/tune_xcorr_loss.py --n 256 1024 --d 2048 8192

bench() { # NAME PRESET OPTIONS...
  "$python" benchmarks/bench_step.py --preset "$2" --json "$results/step_$1.json" "${@:3}"
}
for encoder in mobilenetv1_100 mobilenetv3_large_100 efficientnet_b0 resnet50; do
  bench "${encoder}_224_gpu" imagenet100 --encoder.name "$encoder"
done
bench mobilenetv1_100_32_gpu cifar10

if [[ -n "${2:-}" ]]; then
  time "$python" -m sacl_fast train cifar10 --data.root "$2" --epochs 100 --out "$results/cifar10"
fi
