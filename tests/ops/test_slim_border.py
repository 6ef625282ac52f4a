"""The reference of slim_border against the operators that it stands for, in float64, and what it
gives in other types. Its kernels are tested in tests/cuda/test_cuda_slim_border.py."""

import pytest
import torch
from borders import CLASSES, PARAMETERS, STATISTICS, WINDOWS, Call, call, copied, exact, gradient_of

from sacl_fast.ops import compiled, slim_border
from sacl_fast.ops.batch_norm_act import ACTIVATIONS


def compare(given: Call) -> None:
    offset, updated, grads = exact(given)
    own = copied(given)
    ours, saved = slim_border._forward(*own)
    torch.testing.assert_close(ours, offset)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(own, name), getattr(updated, name))
    found = slim_border._backward(gradient_of(offset), saved, *given.of_backward)
    for got, expected in zip(found, grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_equals_the_operators_it_stands_for(window):
    compare(call(window, act=WINDOWS.index(window) % len(ACTIVATIONS)))


@pytest.mark.parametrize("act", range(len(ACTIVATIONS)), ids=list(ACTIVATIONS))
def test_activations(act):
    compare(call(WINDOWS[0], act))


def test_without_a_rest_without_statistics_and_with_all_outputs():
    compare(call(WINDOWS[0], with_rest=False))
    compare(call(WINDOWS[1])._replace(running_mean=None, running_var=None, out_index=None))


@pytest.mark.parametrize(("window", "classes"), list(zip(WINDOWS, CLASSES, strict=True)), ids=str)
def test_classes_of_pixels(window, classes):
    _, saved = slim_border._forward(*call(window))
    assert saved.shape == (classes + 1, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types(dtype):
    given = call(WINDOWS[0], dtype=dtype)
    offset, saved = slim_border._forward(*given)
    assert offset.dtype == dtype and saved.dtype == torch.float32
    assert offset.is_contiguous(memory_format=torch.channels_last)
    found = slim_border._backward(offset.float(), saved, *given.of_backward)
    assert [t.dtype for t in found] == [getattr(given, name).dtype for name in PARAMETERS]


@pytest.mark.skipif(not slim_border.is_compiled(), reason=str(compiled.obstacle()))
def test_the_operators_keep_the_rules_of_torch_library():
    given, op = call(WINDOWS[0], dtype=torch.float32), torch.ops.sacl_fast
    # Its gradients are for recorded passes, which ask for slim_border_backward themselves.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.slim_border, given, test_utils=checks)
    offset, saved = op.slim_border(*copied(given))
    backward = gradient_of(offset), saved, *given.of_backward
    torch.library.opcheck(op.slim_border_backward, backward, test_utils=checks)
