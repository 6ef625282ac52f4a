"""The parts of a batch norm on a CUDA device against ops/norm_act.py in float64, and against
batch_norm_act, which is all of them in one."""

import pytest
import torch
from cuda_devices import DTYPES, assert_near, both, emulator, images

from sacl_fast.ops.batch_norm_act import ACTIVATIONS
from sacl_fast.ops.norm_act import _OPERATORS as EXACT

EPS, MOMENTUM = 1e-5, 0.1
ACTS = range(len(ACTIVATIONS))
# Vectors of channels, single ones, more channels than a block takes, few rows and many.
SHAPES = [(3, 40, 5, 7), (2, 8, 9, 4), (5, 7, 3, 3), (4, 1, 11, 13), (2, 264, 3, 3), (2, 16, 1, 1)]
emulated = pytest.mark.parametrize("device", ["emulated"], indirect=True)


def double(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def check(device, name, *given, dtypes, slack=3.0):
    """Runs an operator on the device; its outputs (of these types) and what it updates are near
    what float64 gives."""
    put = [device.put(t) if isinstance(t, torch.Tensor) else t for t in given]
    own = getattr(device.ops, f"norm_act_{name}")(*put)
    exact_given = [double(t) for t in given]
    exact = EXACT[name](*exact_given)
    own, exact = (list(r) if isinstance(r, tuple) else [r] for r in (own, exact))
    for got, expected, dtype in zip(own, exact, dtypes, strict=True):
        assert got.dtype == dtype
        assert_near(got, expected, dtype, slack)
    for before, got, expected in zip(given, put, exact_given, strict=True):
        if isinstance(got, torch.Tensor) and got.is_floating_point():
            assert got.shape == before.shape
            assert_near(got, expected, torch.float32, slack)
    return own


def vectors(K, mean=0.0, seed=0):
    """A random affine, of images about this mean."""
    generator = torch.Generator().manual_seed(K + seed)
    scale, bias, more = torch.randn(3, K, generator=generator)
    rstd = 0.1 + torch.rand(K, generator=generator)
    return torch.stack([scale, bias, mean + more, rstd])


def clone(t):
    return None if t is None else t.clone()


def around(mean, *shape, dtype, seed=0):
    return (3 * images(*shape, dtype=torch.float32, seed=seed) + mean).to(dtype)


def lists(K, C, R, seed=0):
    order = torch.randperm(C, generator=torch.Generator().manual_seed(seed))
    return order[:K], order[K : K + R]


def merged(sums):
    """Of several sets of sums, as one, in float64."""
    counts, means, squares = sums.cpu().double().unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    return torch.stack([total, mean, (squares + counts * (means - mean).square()).sum(0)])


@both()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(device, shape):
    for dtype in DTYPES:
        for mean in (2.0, 1000.0):
            x = around(mean, *shape, dtype=dtype)
            sums = device.ops.norm_act_moments(device.put(x))
            assert (
                sums.dtype == torch.float32 and (sums[:, 0] > 0).all() and (sums[:, 2] >= 0).all()
            )
            exact = EXACT["moments"](x.double())[0]
            for got, expected in zip(merged(sums), exact, strict=True):
                assert_near(got, expected, torch.float32, 3)


@both()
def test_a_constant_channel_has_no_variance_and_nan_stays(device):
    x = around(1000.0, 4, 24, 3, 3, dtype=torch.float32)
    x[:, 5] = 7.25
    x[1, 3, 0, 0] = float("nan")
    _, mean, squares = merged(device.ops.norm_act_moments(device.put(x)))
    assert mean[5] == 7.25 and squares[5] == 0
    assert mean[3].isnan() and squares[3].isnan() and not mean[4].isnan()


@both()
@pytest.mark.parametrize("K", [1, 7, 8, 40])
@pytest.mark.parametrize("sets", [1, 70, 300])
def test_affine(device, K, sets):
    generator = torch.Generator().manual_seed(K)
    C, R = K + 13, 9
    weight, bias, running_mean = torch.randn(3, C, generator=generator)
    running_var = torch.rand(C, generator=generator)
    mean_shift = torch.randn(K, generator=generator)
    counts = torch.randint(1, 50, (sets, 1), generator=generator).expand(sets, K).float()
    means = 1000 + torch.randn(sets, K, generator=generator)
    squares = counts * torch.rand(sets, K, generator=generator)
    sums = torch.stack([counts, means, squares], 1)
    count = int(counts[:, 0].sum()) + 5
    running = running_mean, running_var
    for act in ACTS:
        for index in (lists(K, C, R), (lists(K, C, 0)[0], None)):
            given = sums, weight, bias, *index, *(r.clone() for r in running), mean_shift, count
            check(device, "affine", *given, MOMENTUM, EPS, act, dtypes=[torch.float32] * 2)
    own = weight[:K], bias[:K], None, None
    arguments = (*own, None, None, None, count, MOMENTUM, EPS, 0)
    affine, rest = check(device, "affine", sums, *arguments, dtypes=[torch.float32] * 2)
    assert affine.shape == (4, K) and rest.shape == (0,)
    # An empty set changes nothing, whatever it has for a mean.
    empty = torch.tensor([0.0, float("nan"), float("nan")]).view(1, 3, 1).expand(1, 3, K)
    for padded in (torch.cat([empty, sums]), torch.cat([sums, empty])):
        put = [device.put(t) if isinstance(t, torch.Tensor) else t for t in (padded, *arguments)]
        assert_near(device.ops.norm_act_affine(*put)[0], affine.cpu().double(), torch.float32)


@both()
@pytest.mark.parametrize("K", [1, 7, 8, 40])
@pytest.mark.parametrize("sets", [1, 300])
def test_coefficients(device, K, sets):
    generator = torch.Generator().manual_seed(K)
    C, R = K + 13, 9
    weight, bias = torch.randn(2, C, generator=generator)
    gsums, drest = torch.randn(sets, 2, K, generator=generator), torch.randn(R, generator=generator)
    affine = vectors(K, 1000.0)
    f32 = [torch.float32] * 3
    for act in ACTS:
        given = gsums, drest, weight, bias, *lists(K, C, R), affine, 77, act
        check(device, "coefficients", *given, dtypes=f32)
    kept, zeroed = lists(K, C, R)
    for index in ((kept, None), (kept, zeroed)):
        check(device, "coefficients", gsums, None, weight, bias, *index, affine, 77, 1, dtypes=f32)
    full = weight[:K].clone(), bias[:K].clone(), None, None
    check(device, "coefficients", gsums, None, *full, affine, 77, 1, dtypes=f32)


@both()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_apply(device, shape, act):
    K = shape[1]
    for dtype in DTYPES:
        x, other = around(1000.0, *shape, dtype=dtype), around(-2.0, *shape, dtype=dtype, seed=1)
        for more in ((None, None), (other, None), (other, vectors(K, -2.0, 1))):
            given = x, vectors(K, 1000.0), act, *more, (act + 3) % len(ACTS)
            (y,) = check(device, "apply", *given, dtypes=[dtype])
            assert y.is_contiguous(memory_format=torch.channels_last)


@both()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_and_gate_gradient(device, shape):
    for dtype in DTYPES:
        for act in ACTS:
            x, affine = around(10.0, *shape, dtype=dtype), vectors(shape[1], 10.0)
            check(device, "mean", x, affine, act, dtypes=[dtype])
            dy = images(*shape, dtype=dtype, seed=1)
            check(device, "gate_gradient", dy, x, affine, act, dtypes=[torch.float32])


@both()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_gradient(device, shape, act):
    N, K = shape[:2]
    for dtype in DTYPES:
        x, dy = around(1000.0, *shape, dtype=dtype), images(*shape, dtype=dtype, seed=1)
        gate, dmean = (3 * images(N, K, 1, 1, dtype=dtype, seed=s)[:, :, 0, 0] for s in (2, 3))
        for more in ((None, None), (gate, None), (None, dmean), (gate, dmean)):
            given = [dy, x, vectors(K, 1000.0), act, *more]
            put = [device.put(t) if isinstance(t, torch.Tensor) else t for t in given]
            g, gsums = device.ops.norm_act_gradient(*put)
            exact, exact_sums = EXACT["gradient"](*map(double, given))
            assert g.dtype == dtype and gsums.dtype == torch.float32
            assert_near(g, exact, dtype, 3)
            for got, expected in zip(gsums.cpu().double().sum(0), exact_sums[0], strict=True):
                assert_near(got, expected, torch.float32, 10)
            assert (g.numel() == 0) == (act == 0 and more == (None, None))


@both()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("more", [1, 8])
def test_gradient_of_the_first_channels(device, shape, more):
    N, K, H, W = shape
    for dtype in DTYPES:
        x = around(1000.0, *shape, dtype=dtype)
        dy = images(N, K + more, H, W, dtype=dtype, seed=1)
        gate = 3 * images(N, K, 1, 1, dtype=dtype, seed=2)[:, :, 0, 0]
        for act, own_gate in ((0, None), (0, gate), (4, None), (2, gate)):
            given = [dy, x, vectors(K, 1000.0), act, own_gate, own_gate]
            put = [device.put(t) if isinstance(t, torch.Tensor) else t for t in given]
            g, gsums = device.ops.norm_act_gradient(*put)
            exact, exact_sums = EXACT["gradient"](*map(double, given))
            assert g.dtype == dtype and g.shape == x.shape
            assert g.is_contiguous(memory_format=torch.channels_last)
            assert_near(g, exact, dtype, 3)
            for got, expected in zip(gsums.cpu().double().sum(0), exact_sums[0], strict=True):
                assert_near(got, expected, torch.float32, 10)


@both()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_gradient(device, shape):
    for dtype in DTYPES:
        g, y = images(*shape, dtype=dtype, seed=1), around(1000.0, *shape, dtype=dtype)
        coefficients = vectors(shape[1], 1000.0)[[0, 1, 3, 2]]
        (dy,) = check(device, "input_gradient", g, y, coefficients, dtypes=[dtype])
        assert dy.is_contiguous(memory_format=torch.channels_last)


@both()
@pytest.mark.parametrize("shape", [(3, 40, 4, 5), (5, 7, 3, 3), (2, 1, 3, 6)], ids=str)
def test_offset_gradient(device, shape):
    N, K, H, W = shape
    whole = [[1, K, 1, 1], [N, K, 1, 1], [1, K, H, W], [N, K, H, W], [1, K, H, 1], [N, K, 1, W]]
    borders = [[1, 1, 1, 1], [2, 0, 1, 0], [0, 0, 0, 2], [H, 0, 0, 0], [0, 0, 0, 0], [1, 2, 0, 0]]
    for dtype in DTYPES:
        g, y = images(*shape, dtype=dtype, seed=1), around(1000.0, *shape, dtype=dtype)
        coefficients = vectors(K, 1000.0)[[0, 1, 3, 2]]
        for more in ((None, None), (y, coefficients)):
            for to, border in [*((s, []) for s in whole), *((whole[2], b) for b in borders)]:
                given = g, *more, to, border
                check(device, "offset_gradient", *given, dtypes=[torch.float32], slack=10)


@both()
def test_pixels_within_the_border_are_not_read(device):
    g = images(3, 16, 6, 7, dtype=torch.float32)
    clean = device.ops.norm_act_offset_gradient(
        device.put(g), None, None, [1, 16, 6, 7], [1, 2, 1, 1]
    )
    g[:, :, 1:4, 1:6] = float("nan")
    given = device.put(g), None, None, [1, 16, 6, 7], [1, 2, 1, 1]
    assert torch.equal(device.ops.norm_act_offset_gradient(*given), clean)
    assert_near(clean.sum((2, 3)).cpu() + 1, torch.ones(1, 16).double(), torch.float32, 10)


def composed(device, act, given, count):
    """What batch_norm_act and its backward give, from the parts."""
    x, dy, weight, bias, kept, zeroed, mean, var, drest = given
    ops, parameters = device.ops, (weight, bias, kept, zeroed)
    numbers = (MOMENTUM, EPS, act)
    sums = ops.norm_act_moments(x)
    affine, rest = ops.norm_act_affine(sums, *parameters, mean, var, None, count, *numbers)
    y = ops.norm_act_apply(x, affine, act, None, None, 0)
    g, gsums = ops.norm_act_gradient(dy, x, affine, act, None, None)
    values = x.numel() // x.shape[1]
    coefficients, dweight, dbias = ops.norm_act_coefficients(
        gsums, drest, *parameters, affine, values, act
    )
    dx = ops.norm_act_input_gradient(g if g.numel() else dy, x, coefficients)
    return y, rest, affine[2], affine[3], mean, var, dx, dweight, dbias


def in_one(device, act, given, count):
    x, dy, weight, bias, kept, zeroed, mean, var, drest = given
    parameters, numbers = (weight, bias, kept, zeroed), (count, MOMENTUM, EPS, act)
    y, rest, *own = device.ops.batch_norm_act(x, *parameters, mean, var, *numbers)
    drest = None if drest is None else drest.view(1, -1, 1, 1).to(x.dtype)
    grads = device.ops.batch_norm_act_backward(dy, drest, x, *parameters, *own, act)
    return y, rest.flatten(), *own, mean, var, *grads


@both()
@pytest.mark.parametrize("K", [1, 7, 8, 40])
@pytest.mark.parametrize("act", ACTS)
def test_the_parts_are_batch_norm_act(device, K, act):
    generator = torch.Generator().manual_seed(K)
    C, R = K + 13, 9
    vectors = torch.randn(3, C, generator=generator).unbind()
    var, drest = torch.rand(C, generator=generator), torch.randn(R, generator=generator)
    for dtype in DTYPES:
        x, dy = around(1000.0, 3, K, 5, 7, dtype=dtype), images(3, K, 5, 7, dtype=dtype, seed=1)
        full = (*vectors, var)
        slim = x, dy, *full[:2], *lists(K, C, R), *full[2:], drest.to(dtype).float()
        live = [t[:K].clone() for t in full]
        for given, count in ((slim, 140), ((x, dy, *live[:2], None, None, *live[2:], None), 105)):
            own, exact = (
                function(device, act, [device.put(clone(t)) for t in given], count)
                for function in (composed, in_one)
            )
            for got, expected in zip(own, exact, strict=True):
                rounded = dtype if dtype in (got.dtype, expected.dtype) else torch.float32
                # The mean, 1000, is rounded to float32 before it is subtracted.
                assert_near(got, expected.cpu().double(), rounded, 10)


@both()
def test_where_images_lie_changes_no_number_of_sets(device):
    x = around(2.0, 3, 16, 9, 9, dtype=torch.float16)
    expected = device.ops.norm_act_moments(device.put(x))
    memory = torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()])
    off = device.put(memory)[1:].view(3, 9, 9, 16).permute(0, 3, 1, 2)
    sums = device.ops.norm_act_moments(off)
    assert sums.shape == expected.shape
    for got, exact in zip(merged(sums), merged(expected), strict=True):
        assert_near(got, exact, torch.float32, 3)
    affine = device.put(vectors(16, 2.0))
    y = [device.ops.norm_act_apply(t, affine, 4, None, None, 0) for t in (off, device.put(x))]
    assert_near(y[0], y[1].cpu().double(), torch.float16)


@emulated
def test_the_order_of_threads_changes_nothing(device):
    x, dy = (
        around(1000.0, 4, 40, 6, 6, dtype=torch.bfloat16),
        images(4, 40, 6, 6, dtype=torch.bfloat16),
    )
    gate = images(4, 40, 1, 1, dtype=torch.bfloat16)[:, :, 0, 0]
    weight, bias = torch.randn(2, 60, generator=torch.Generator().manual_seed(0))

    def run():
        index, ops = lists(40, 60, 9), device.ops
        arguments = (None, None, None, 144, MOMENTUM, EPS, 4)
        outputs = list(
            ops.norm_act_affine(ops.norm_act_moments(x), weight, bias, *index, *arguments)
        )
        affine = outputs[0]
        outputs += ops.norm_act_gradient(dy, x, affine, 4, gate, gate)
        g, gsums = outputs[-2:]
        outputs += ops.norm_act_coefficients(gsums, None, weight, bias, *index, affine, 144, 4)
        coefficients = outputs[-3]
        outputs += [ops.norm_act_mean(x, affine, 4), ops.norm_act_gate_gradient(dy, x, affine, 4)]
        for shape, border in (([1, 40, 1, 1], []), ([1, 40, 6, 6], [1, 1, 1, 1])):
            outputs.append(ops.norm_act_offset_gradient(g, x, coefficients, shape, border))
        return outputs

    first = run()
    emulator().sacl_simt_reverse(1)
    try:
        assert all(map(torch.equal, first, run()))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    x, affine = images(3, 16, 5, 5, dtype=torch.bfloat16), vectors(16)
    x, affine, weight = device.put(x), device.put(affine), device.put(torch.ones(15))
    ops = device.ops
    with pytest.raises(RuntimeError, match="no such activation"):
        ops.norm_act_apply(x, affine, 0, None, None, 9)
    with pytest.raises(RuntimeError, match=r"affine has not the shape \(4, 16\)"):
        ops.norm_act_mean(x, affine[:3], 0)
    with pytest.raises(RuntimeError, match="dy is of another type"):
        ops.norm_act_gradient(x.float(), x, affine, 0, None, None)
    with pytest.raises(RuntimeError, match="dy has 16 channels, fewer than x's 32"):
        ops.norm_act_gradient(x, torch.cat([x, x], 1), affine, 0, None, None)
    with pytest.raises(RuntimeError, match="gate is not contiguous, of the expected type"):
        ops.norm_act_gradient(x, x, affine, 0, affine[:3].contiguous(), None)
    with pytest.raises(RuntimeError, match="y goes with coefficients"):
        ops.norm_act_offset_gradient(x, x, None, [1, 16, 5, 5], [])
    with pytest.raises(RuntimeError, match="does not spread over the output"):
        ops.norm_act_offset_gradient(x, None, None, [1, 16, 5, 4], [])
    with pytest.raises(RuntimeError, match="the border is larger than the image"):
        ops.norm_act_offset_gradient(x, None, None, [1, 16, 5, 5], [3, 3, 0, 0])
    sums = ops.norm_act_moments(x)
    lists_and_statistics = (None, None, None, None, None)
    with pytest.raises(RuntimeError, match="16 live and 0 zeroed channels are not of 15"):
        ops.norm_act_affine(sums, weight, weight, *lists_and_statistics, 75, MOMENTUM, EPS, 0)
