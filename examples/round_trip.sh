#!/usr/bin/env bash
# From images to files for a device, with figures on the way:
#
#     examples/round_trip.sh IMAGES OUT [options of the preset demo]
#
# IMAGES: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, such as CIFAR-10. The settings are
# for two minutes on a CPU: a small encoder, few epochs. For figures to report, see the presets of the
# README.
set -euo pipefail
images=$1 out=$2
shift 2

sacl-fast train demo --out "$out/run" --data.source folder --data.root "$images" \
  --views.size 32 --encoder.width 0.5 "$@"

sacl-fast eval knn "$out/run"
sacl-fast eval linear "$out/run" --fast
sacl-fast eval few-shot "$out/run" --per-class 5 --percent 10
sacl-fast finetune "$out/run" --steps 200 --size 32

sacl-fast export "$out/run" "$out/files" --width dense,slim --format timm,onnx --int8 --knn
