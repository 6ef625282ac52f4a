"""The two ceilings of a device: bytes a second of a large copy, FLOP a second of a large product.

    python benchmarks/bench_ceilings.py --device cuda --json ceilings.json

The copy counts bytes read and bytes written. The product is of random bfloat16 matrices on a GPU,
of float32 ones on a CPU: zeros would be faster than real data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sacl_fast.bench.figures import device_name, write_json
from sacl_fast.engine.ceilings import copy_bandwidth, product_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device\n")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = {
        "benchmark": "bench_ceilings",
        "device": device_name(device),
        "dtype": str(dtype),
        "bytes_per_s": copy_bandwidth(device),
        "flop_per_s": product_rate(device, dtype),
    }
    print(
        f"{result['device']}: copy {result['bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"{dtype} product {result['flop_per_s'] / 1e12:,.2f} TFLOP/s"
    )
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
