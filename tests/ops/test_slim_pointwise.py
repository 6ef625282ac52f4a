"""The compiled 1x1 convolution of slim activations against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from sacl_fast.ops import compiled
from sacl_fast.ops.slim_channels import positions_in
from sacl_fast.ops.slim_pointwise import is_compiled, slim_pointwise

pytestmark = pytest.mark.skipif(not is_compiled(), reason=str(compiled.obstacle()))
N = 3
# Input channels, filters; live inputs, kept filters, constant inputs (the rest is not given).
SIZES = [
    *((7, 5, 3, 2, 4), (24, 40, 24, 40, 0), (48, 33, 17, 16, 20), (1, 1, 1, 1, 0)),
    *((9, 20, 1, 8, 5), (9, 20, 4, 1, 5)),  # one channel is in every order of memory at once
]
# Samples and image of an offset: 1 for one value, 0 for all of them
OFFSETS = {"none": None, "bias": (1, 1), "sample": (0, 1), "pixel": (1, 0), "all": (0, 0)}
FEW, MANY = (4, 5), (13, 14)  # pixels: products of matrices, convolutions


def inputs(sizes, samples, offset, batch=N, image=FEW, seed=0):
    g = torch.Generator().manual_seed(seed)
    C, filters, live, kept, constants = sizes
    order, out = torch.randperm(C, generator=g), torch.randperm(filters, generator=g)[:kept]
    x = torch.randn(batch, live, *image, generator=g).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(filters, C, 1, 1, generator=g)
    rest = torch.randn(samples, constants, 1, 1, generator=g) if constants else None
    if offset is not None:
        pixels = (1, 1) if offset[1] else image
        offset = torch.randn(offset[0] or batch, kept, *pixels, generator=g)
    indices = (
        None if live == C else order[:live],
        None if kept == filters else out,
        order[live : live + constants] if constants else None,
    )
    return [x, weight, rest, offset], indices


def run(tensors, indices, backend, map_index=None):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    x, weight, rest, offset, *maps = leaves
    assert x is not None and weight is not None
    in_index, out_index, rest_index = indices
    more = (*maps, map_index) if maps else ()
    y = slim_pointwise(
        x, weight, in_index, out_index, rest, rest_index, offset, *more, backend=backend
    )
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("samples", [1, N])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("image", [FEW, MANY], ids=str)
def test_equals_pytorch(sizes, offset, samples, image):
    tensors, indices = inputs(sizes, samples, OFFSETS[offset], image=image)
    exact = run([None if t is None else t.double() for t in tensors], indices, "torch")
    for got, expected in zip(run(tensors, indices, "cpu"), exact, strict=True):
        assert got.shape == expected.shape
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("samples", [0, 1, N])
@pytest.mark.parametrize("offset", ["none", "bias", "pixel"])
@pytest.mark.parametrize("in_map", [1, 9])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("image", [FEW, MANY], ids=str)
def test_with_a_map(offset, samples, in_map, memory_format, image):
    sizes = (48, 33, 17, 16, 20 if samples else 0)
    tensors, indices = inputs(sizes, samples, OFFSETS[offset], image=image)
    taken = set(torch.cat([i for i in (indices[0], indices[2]) if i is not None]).tolist())
    map_index = torch.tensor([c for c in range(48) if c not in taken][:in_map])
    map_ = torch.randn(1, in_map, *image).contiguous(memory_format=memory_format)
    tensors = [*tensors, map_]
    exact = [None if t is None else t.double() for t in tensors]
    ours = run(tensors, indices, "cpu", map_index)
    for got, expected in zip(ours, run(exact, indices, "torch", map_index), strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=2e-6)


def test_the_reference_is_a_convolution_of_all_channels():
    (x, weight, rest, _), (in_index, out_index, rest_index) = inputs(SIZES[2], N, None)
    full = torch.zeros(N, 48, *FEW)
    full[:, in_index], full[:, rest_index] = x, rest.expand(-1, -1, *FEW)
    others = torch.tensor([c for c in range(48) if not full[:, c].any()][:5])
    full[:, others] = map_ = torch.randn(1, 5, *FEW)
    y = slim_pointwise(
        *(x, weight, in_index, out_index, rest, rest_index, None, map_, others), backend="torch"
    )
    torch.testing.assert_close(y, F.conv2d(full, weight)[:, out_index], rtol=1e-4, atol=1e-5)


def test_one_sample_and_one_pixel():
    for batch in (1, 2):
        tensors, indices = inputs((6, 8, 4, 5, 2), 1, (1, 1), batch)
        tensors[0] = tensors[0][:, :, :1, :1].contiguous(memory_format=torch.channels_last)
        exact = run([t.double() for t in tensors], indices, "torch")
        for got, expected in zip(run(tensors, indices, "cpu"), exact, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_offset_is_refused():
    tensors, indices = inputs(SIZES[0], 1, (1, 0))
    tensors[-1] = tensors[-1][:, :, :1]
    with pytest.raises(RuntimeError, match="offset"):
        run(tensors, indices, "cpu")


def test_the_operators_keep_the_rules_of_torch_library():
    (x, weight, rest, offset), (in_index, out_index, rest_index) = inputs(SIZES[2], N, (1, 0))
    op, lists = torch.ops.sacl_fast, (in_index, out_index, rest.flatten(1), rest_index)
    weight, offset = weight.flatten(1), offset.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(op.slim_pointwise, (x, weight, *lists, offset))
    y = op.slim_pointwise(x, weight, *lists, offset)
    given = y, x, weight, *lists, list(offset.shape)
    positions = {
        "out_positions": positions_in(out_index, weight.shape[0]),
        "in_positions": positions_in(in_index, weight.shape[1], rest_index),
    }
    torch.library.opcheck(op.slim_pointwise_backward, given)
    torch.library.opcheck(op.slim_pointwise_backward, given, positions)
