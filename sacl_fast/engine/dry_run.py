"""``--dry-run``: what a configuration comes to, without training.

FLOPs are counted by running the encoder once; memory is estimated from the tensors that autograd
keeps of a small batch.
"""

from __future__ import annotations

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sacl_fast.config import Config, to_dict
from sacl_fast.data.images.open import open_sources
from sacl_fast.engine.distributed import pick_device
from sacl_fast.engine.launch import read_launch
from sacl_fast.engine.method import SaclXd, build_method
from sacl_fast.engine.preflight import check_run, remarks
from sacl_fast.errors import UserError
from sacl_fast.passes import Passes
from sacl_fast.precision import autocast_dtype

_GIB, _PROBE_BATCH = 2**30, 4


def print_dry_run(config: Config) -> None:
    """Print the resolved configuration, sizes, FLOPs and an estimate of memory."""
    check_run(config)
    world_size = read_launch().world_size
    method = build_method(config, Passes())
    encoder_parameters = _count(method.encoder)
    projector_parameters = _count(method.projector)
    forward = _forward_flops(method, config.views.size)
    # A pass with gradient is a forward and a backward of twice its cost.
    passes = 2 * 3 + (2 if method.distill else 0)
    half = autocast_dtype(config.precision, pick_device(config.device)) is not None
    kept = sum(int(mask.sum()) for mask in method.slicer.masks.values())
    filters = sum(len(mask) for mask in method.slicer.masks.values())

    print(yaml.safe_dump(to_dict(config), sort_keys=False))
    print(f"encoder     {encoder_parameters / 1e6:.2f} M parameters")
    print(f"projector   {projector_parameters / 1e6:.2f} M parameters")
    print(f"slim        {kept:,} of {filters:,} filters in {len(method.slicer.masks)} convolutions")
    print(f"forward     {forward / 1e9:.3f} GFLOP an image (a multiplication and addition: 2)")
    step = passes * forward * config.batch_size
    print(f"step        {step / 1e12:.2f} TFLOP for {config.batch_size} images ({passes} forwards)")
    state, activations = _memory(method, config, world_size, half)
    print(
        f"memory      {(state + activations) / _GIB:.1f} GiB per process, estimated: "
        f"{state / _GIB:.2f} weights, gradients and optimiser, {activations / _GIB:.2f} activations"
    )
    try:
        images = len(open_sources(config.data, config.seed, download=False).train)
    except UserError as error:
        print(f"data        not available: {error}")
    else:
        steps = images // config.batch_size
        whole = steps * config.epochs
        print(f"data        {images:,} images, {steps:,} steps an epoch, {whole:,} in all")
        for sentence in remarks(config, images):
            print(f"warning     {sentence}")


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _forward_flops(method: SaclXd, size: int) -> int:
    """FLOPs of encoder and projector on one image."""
    counter = FlopCounterMode(display=False)
    trained = [p for p in method.parameters() if p.requires_grad]
    # Without gradient: the counter asks for the history of what goes from module to module, and a
    # parameter that does (a class token) has none.
    method.eval().requires_grad_(False)
    with counter, torch.no_grad():
        method.dense(torch.zeros(1, 3, size, size))
    method.train()
    for parameter in trained:
        parameter.requires_grad_()
    return counter.get_total_flops()


def _memory(method: SaclXd, config: Config, world_size: int, half: bool) -> tuple[int, int]:
    """Bytes of weights, gradients and optimiser, and of activations, in one process."""
    copies = 3 if config.optim.name == "lars" else 4  # weight, gradient, momentum (two for Adam)
    parameters = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(_PROBE_BATCH, 3, config.views.size, config.views.size)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = method.dense(images)
    del output
    per_image = sum(kept.values()) / _PROBE_BATCH * (0.5 if half else 1.0)
    # Both passes with gradient are alive when the backward starts.
    activations = int(2 * per_image * config.batch_size / world_size)
    return 4 * copies * _count(method), activations
