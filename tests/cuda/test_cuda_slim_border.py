"""The CUDA slim_border against the operators that it stands for in float64: values, gradients,
running statistics."""

import pytest
import torch
from borders import PARAMETERS, STATISTICS, WINDOWS, Call, call, copied, exact, gradient_of
from cuda_devices import DTYPES, assert_near, both, emulator
from torch import Tensor

from sacl_fast.ops import slim_border
from sacl_fast.ops.batch_norm_act import ACTIVATIONS

emulated = pytest.mark.parametrize("device", ["emulated"], indirect=True)
# Channels between the convolutions, filters that read a constant, outputs, constants of the rest:
# one of each; more than share one block, outputs in vectors; more threads than a sum has, and more
# outputs than vectors of a block; no rest.
SIZES = [(2, 1, 1, 1), (50, 19, 20, 23), (150, 70, 131, 66), (33, 33, 9, 0)]


def on(device, given: Call) -> Call:
    tensors = {n: v for n, v in given._asdict().items() if isinstance(v, Tensor)}
    return given._replace(**{n: device.put(v) for n, v in tensors.items()})


def compare(device, given: Call) -> None:
    offset, updated, _ = exact(given)
    there = on(device, copied(given))
    ours, saved = device.ops.slim_border(*there)
    assert ours.dtype == given.constants.dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_near(ours, offset, ours.dtype)
    assert saved.shape == slim_border._forward(*copied(given))[1].shape
    for name in STATISTICS:
        if (found := getattr(there, name)) is not None:
            assert_near(found, getattr(updated, name), torch.float32)
    doffset = gradient_of(offset).float()
    _, _, grads = exact(given, doffset)
    found = device.ops.slim_border_backward(device.put(doffset), saved, *there.of_backward)
    for name, got, expected in zip(PARAMETERS, found, grads, strict=True):
        like = getattr(given, name)
        assert like is None or got.dtype == like.dtype
        # The constants' gradient is what is left of larger numbers.
        assert_near(got, expected, got.dtype, slack=20 if name == "constants" else 3)


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(device, window, dtype):
    compare(device, call(window, act=WINDOWS.index(window) % len(ACTIVATIONS), dtype=dtype))


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_numbers_of_channels(device, sizes, dtype):
    given = call(WINDOWS[1], sizes=sizes, dtype=dtype, with_rest=sizes[3] > 0)
    compare(device, given)
    compare(device, given._replace(weight=given.weight.float()))


@both()
@pytest.mark.parametrize("act", range(len(ACTIVATIONS)), ids=list(ACTIVATIONS))
def test_activations(device, act):
    compare(device, call(WINDOWS[0], act, dtype=torch.float32))


@both()
@pytest.mark.parametrize("outputs", [12, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_images_of_several_blocks(device, stride, outputs):
    window = (61, 47), (3, 3), (stride, stride), (1, 1), (1, 1)
    compare(device, call(window, sizes=(20, 9, outputs, 5), dtype=torch.float32))


@both()
def test_types_of_their_own(device):
    given = call(WINDOWS[2], dtype=torch.float32)
    given = given._replace(filters=given.filters.half(), weight=given.weight.bfloat16())
    compare(device, given)


@both()
def test_without_statistics_and_with_all_outputs(device):
    given = call(WINDOWS[0], dtype=torch.float32)
    compare(device, given._replace(running_mean=None, running_var=None, out_index=None))


def run(device, given: Call) -> list[Tensor]:
    there = on(device, copied(given))
    offset, saved = device.ops.slim_border(*there)
    doffset = device.put(gradient_of(offset.cpu()).float())
    return [offset, saved, *device.ops.slim_border_backward(doffset, saved, *there.of_backward)]


@both()
def test_the_same_input_gives_the_same_bits(device):
    given = call(WINDOWS[0], sizes=SIZES[1], dtype=torch.bfloat16)
    assert all(map(torch.equal, run(device, given), run(device, given)))


@emulated
@pytest.mark.parametrize("window", [WINDOWS[4], ((61, 47), *WINDOWS[0][1:])], ids=str)
def test_the_order_of_threads_changes_nothing(device, window):
    given = call(window, sizes=SIZES[1], dtype=torch.float32)
    first = run(device, given)
    emulator().sacl_simt_reverse(1)
    try:
        assert all(map(torch.equal, first, run(device, given)))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_addresses_that_do_not_suit_vectors(device):
    given = call(WINDOWS[0], sizes=(20, 9, 8, 5), dtype=torch.float32)
    offset, _, grads = exact(given)
    there = on(device, copied(given))
    _, saved = device.ops.slim_border(*there)
    aligned = gradient_of(offset).float()
    memory = torch.empty(aligned.numel() + 1, device=saved.device)[1:]
    doffset = memory.as_strided(aligned.shape, aligned.stride()).copy_(aligned)
    found = device.ops.slim_border_backward(doffset, saved, *there.of_backward)
    assert_near(found[4], grads[4], torch.float32)


@both()
def test_wrong_arguments_are_errors(device):
    given = on(device, call(WINDOWS[0], dtype=torch.float32))
    op = device.ops.slim_border
    with pytest.raises(RuntimeError, match="no such activation"):
        op(*given._replace(act=9))
    with pytest.raises(RuntimeError, match="at most 7 taps a side"):
        op(*given._replace(filters=given.filters.new_zeros(14, 1, 8), padding=(0, 4)))
    with pytest.raises(RuntimeError, match="the window is larger than the padded image"):
        op(*given._replace(H=1, padding=(0, 1)))
    with pytest.raises(RuntimeError, match="rest goes with rest_index"):
        op(*given._replace(rest_index=None))
    with pytest.raises(RuntimeError, match=r"norm_index has not the shape \(6\)"):
        op(*given._replace(norm_index=given.norm_index[1:].contiguous()))
    with pytest.raises(RuntimeError, match="longer than what it is of"):
        op(*given._replace(constants=given.constants[:5].contiguous()))
    offset, saved = op(*given)
    with pytest.raises(RuntimeError, match="doffset has not the shape"):
        device.ops.slim_border_backward(offset[:, :, 1:], saved, *given.of_backward)
    with pytest.raises(RuntimeError, match=r"saved has not the shape \(10, 6\)"):
        device.ops.slim_border_backward(offset, saved[1:], *given.of_backward)
