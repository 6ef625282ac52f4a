#!/usr/bin/env bash
# Everything a machine with a GPU should show, in one call: correctness first, then speed.
#
#   benchmarks/on_gpu.sh [RESULTS] [CIFAR10] [PHOTOS]
#
# RESULTS: where the JSON files go (default: benchmarks/results). CIFAR10, PHOTOS: folders or
# archives, on which the data paths are measured. PHOTOS are full-size images, such as some of
# ImageNet's. On CIFAR10, the cifar10 preset is trained for 100 epochs as well (kNN accuracy, time).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$results"

if ! "$python" -c 'import torch, sacl_fast._C' 2> /dev/null; then
  SACL_FAST_BUILD_EXT=1 "$python" setup.py build_ext --inplace
fi
"$python" -m sacl_fast doctor
"$python" -m pytest -q -m gpu tests

# Every access and every barrier of our kernels, at small sizes; without torch's cache, in which an
# access beyond one tensor would meet another.
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider -m gpu -k 'not full_size' \
      tests/cuda/test_cuda_{depthwise_conv,batch_norm_act,slim_pointwise,slim_add,slim_gate}.py
  done
fi

for operator in depthwise_conv batch_norm_act; do
  "$python" "benchmarks/bench_$operator.py" --device cuda --dtype bfloat16 --batch 256 \
    --json "$results/${operator}_gpu.json"
done

slim() { # NAME OPTIONS...
  "$python" benchmarks/bench_slim.py --device cuda --dtype bfloat16 --size 224 --batch 256 \
    --json "$results/slim_$1.json" "${@:2}"
}
slim gpu --seconds 1
slim layers_gpu --layers --encoders mobilenetv1_100 --seconds 0.2

"$python" benchmarks/bench_xcorr_loss.py --seconds 0.3 \
  --json "$results/xcorr_loss_gpu.json" --plot "$results/xcorr_loss_gpu.png"
"$python" benchmarks/tune_xcorr_loss.py --n 256 1024 --d 2048 8192

bench() { # NAME PRESET OPTIONS...
  "$python" benchmarks/bench_step.py --preset "$2" --json "$results/step_$1.json" "${@:3}"
}
for encoder in mobilenetv1_100 mobilenetv3_large_100 efficientnet_b0 resnet50; do
  bench "${encoder}_224_gpu" imagenet100 --encoder.name "$encoder"
  bench "${encoder}_224_skip_gpu" imagenet100 --encoder.name "$encoder" --slim.mode skip
done
bench mobilenetv1_100_32_gpu cifar10

data() { # NAME PRESET OPTIONS...
  "$python" benchmarks/bench_data.py --preset "$2" --json "$results/data_$1.json" \
    --plot "$results/data_$1.png" "${@:3}"
}
if [[ -n "${3:-}" ]]; then
  for encoder in mobilenetv1_100 resnet50; do
    data "imagenet_${encoder}_gpu" imagenet1k --images 4096 --train 30 --data.root "$3" \
      --data.labels none --encoder.name "$encoder"
  done
fi

if [[ -n "${2:-}" ]]; then
  data cifar10_gpu cifar10 --images 8192 --train 30 --data.root "$2"
  time "$python" -m sacl_fast train cifar10 --data.root "$2" --epochs 100 --out "$results/cifar10"
fi
