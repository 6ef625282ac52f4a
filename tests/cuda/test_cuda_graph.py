"""Forward and backward passes of every CUDA operator, captured in a CUDA graph and replayed."""

import pytest
import torch
from cuda_devices import get_device, images
from cuda_graphs import captured

pytestmark = pytest.mark.gpu

BATCH, HIGH = 8, 14
WINDOW = ((1, 1), (1, 1), (1, 1))


def channels_last(channels, seed, dtype=torch.bfloat16):
    return images(BATCH, channels, HIGH, HIGH, dtype=dtype, seed=seed).cuda()


def test_replayed_on_new_values():
    ops = get_device("cuda").ops
    torch.manual_seed(0)
    x, dy, dz, ds = (channels_last(*c) for c in ((40, 1), (24, 2), (32, 3), (48, 4)))
    kept, zeroed = torch.arange(24).cuda(), torch.arange(24, 40).cuda()
    filters = torch.randn(24, 3, 3).bfloat16().cuda()
    scale, shift = torch.rand(40).cuda(), torch.randn(40).cuda()
    running = torch.zeros(40).cuda(), torch.ones(40).cuda()
    matrix = torch.randn(32, 40).cuda()
    source = torch.arange(48).cuda()
    rest16 = torch.randn(16).bfloat16().cuda()
    gate = torch.rand(BATCH, 32).bfloat16().cuda()

    def step():
        y = ops.depthwise_conv(x, filters, kept, *WINDOW)
        dx = ops.depthwise_conv_backward_input(dy, filters, kept, HIGH, HIGH, 40, *WINDOW)
        dfilters = ops.depthwise_conv_backward_weight(x, dy, kept, 3, 3, *WINDOW)
        count = BATCH * HIGH * HIGH
        n, rest, mean, rstd = ops.batch_norm_act(
            y, scale, shift, kept, zeroed, *running, count, 0.1, 1e-5, 1
        )
        norm_grads = ops.batch_norm_act_backward(
            dy, rest, y, scale, shift, kept, zeroed, mean, rstd, 1
        )
        constants = rest.flatten(1)
        z = ops.slim_pointwise(n, matrix, kept, None, constants, zeroed, None)
        grads = ops.slim_pointwise_backward(dz, n, matrix, kept, None, constants, zeroed, [])
        g = ops.slim_gate(z, None, gate, None, None)
        gate_grads = ops.slim_gate_backward(dz, z, None, gate, None, None)
        total = ops.slim_add(g, rest16, source, g, rest16, source)
        sum_grads = ops.slim_add_backward(ds, 32, 16, source, 32, 16, source)
        return [dx, dfilters, *norm_grads, z, *grads, *gate_grads, total, *sum_grads]

    graph, outputs = captured(step)
    x.copy_(channels_last(40, 9))
    dy.copy_(channels_last(24, 10))
    graph.replay()
    replayed = [t.clone() for t in outputs]
    again = step()
    assert all(map(torch.equal, replayed[:5], again))  # our own sums are in a fixed order
    for got, expected in zip(replayed, again, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert running[0].abs().sum() > 0


def test_on_another_stream():
    ops = get_device("cuda").ops
    x = channels_last(40, 1)
    filters = torch.randn(40, 3, 3).bfloat16().cuda()
    expected = ops.depthwise_conv(x, filters, None, *WINDOW)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # what follows must wait for it
        later = torch.empty_like(x)
        later.copy_(x)
        y = ops.depthwise_conv(later, filters, None, *WINDOW)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)
