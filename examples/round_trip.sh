#!/usr/bin/env bash
# From images to files for a device, with figures on the way:
#
#     examples/round_trip.sh IMAGES OUT [options of sacl-fast train]
#     python examples/exported_files.py OUT/files IMAGES
#
# IMAGES: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, such as a part of CIFAR-10. The settings
# are for some 400 steps on a CPU (5 epochs of 5,000 images): a very small EfficientNet, and therefore
# mild crops and few features to decorrelate. For figures to report, see the presets of the README.
set -euo pipefail
if (($# < 2)); then
  echo "usage: examples/round_trip.sh IMAGES OUT [options of sacl-fast train]" >&2
  exit 2
fi
images=$1 out=$2
shift 2

sacl-fast train cifar10 --out "$out/run" --data.source folder --data.root "$images" \
  --encoder.name test_efficientnet --encoder.stem imagenet \
  --views.a.crop-scale 0.4 1 --views.b.crop-scale 0.4 1 \
  --projector.hidden 256 --projector.out 64 --loss.scale 0.4 --loss.lambda 0.02 \
  --optim.name adamw --optim.lr 0.016 --batch-size 64 --epochs 5 "$@"

sacl-fast eval knn "$out/run"
sacl-fast eval linear "$out/run" --fast
sacl-fast eval few-shot "$out/run" --per-class 5 --percent 10
sacl-fast finetune "$out/run" --steps 200 --size 32

sacl-fast export "$out/run" "$out/files" --width dense,slim --format timm,onnx --int8
