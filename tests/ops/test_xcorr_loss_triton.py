"""The Triton kernels against the reference: on a GPU, or on any machine in Triton's interpreter.

Whether kernels are interpreted is settled when Triton is imported, so without a GPU the last test
runs this file once more in a process of its own. The interpreter shows no races and no layouts, and
its bf16 products are wrong, so bf16 is for the GPU alone.
"""

import os
import subprocess
import sys

import pytest
import torch
from cuda_graphs import captured
from xcorr_loss_pseudocode import SETTINGS, embeddings, in_float64, pseudocode, relative_errors

from sacl_fast.bench.figures import kernel_launches
from sacl_fast.losses import SaclXdLoss
from sacl_fast.ops import xcorr_loss_reference
from sacl_fast.ops.xcorr_loss import _xcorr_loss, sacl_xd_loss
from sacl_fast.ops.xcorr_loss_reference import Rows, Terms
from sacl_fast.verification import Wrong, verify

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Of the norm. Half types: their own rounding; fp32: tf32x3 on the GPU, fp32 in the interpreter.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 2e-3}
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# Odd sizes, one feature, one tile and several, N > D.
SHAPES = [(7, 5), (6, 1), (33, 70), (64, 64), (70, 130), (200, 32)]
if not INTERPRETED:
    SHAPES += [(256, 2048), (256, 8192), (1024, 2048), (4096, 512), (300, 777), (2000, 1111)]


def device_test(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


@device_test
@pytest.mark.parametrize("algorithm", ["gram", "tiles"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(dtype, shape, algorithm):
    variants = (
        {},
        {"distillation": "none"},
        {"pairing": "cross_width", "variance": "unbiased"},
    )
    # Interpreted, several tiles take seconds; there the variants are of float32 alone.
    slow = INTERPRETED and dtype != torch.float32 and max(shape) > 64
    for variant in variants[:1] if slow else variants:
        zs = embeddings(*shape, dtype=dtype, device=DEVICE)
        exact = in_float64(zs)
        loss, parts = sacl_xd_loss(
            *zs, **SETTINGS, **variant, algorithm=algorithm, backend="triton"
        )
        torch.testing.assert_close(sum(parts), loss.detach())
        errors = relative_errors(loss, zs, pseudocode(*exact, **variant), exact)
        assert max(errors) < TOLERANCES[dtype], (variant, errors)


@device_test
@pytest.mark.parametrize("algorithm", ["gram", "tiles"])
def test_offsets_and_scales_of_features(algorithm):
    for change in (lambda z: z + 1000, lambda z: z * torch.logspace(-1, 5, 40, device=DEVICE)):
        zs = [
            change(z.detach()).requires_grad_(z.requires_grad)
            for z in embeddings(48, 40, torch.float32, DEVICE)
        ]
        exact = in_float64(zs)
        loss, _ = sacl_xd_loss(*zs, **SETTINGS, algorithm=algorithm, backend="triton")
        assert max(relative_errors(loss, zs, pseudocode(*exact), exact)) < 1e-3


@device_test
@pytest.mark.parametrize("algorithm", ["gram", "tiles"])
def test_strides_nan_and_repetition(algorithm):
    zs = embeddings(24, 40, torch.float32, DEVICE)
    arguments = {"algorithm": algorithm, "backend": "triton"}
    expected, _ = sacl_xd_loss(*zs, **arguments)
    strided = [z.detach().T.contiguous().T for z in zs[:2]]
    strided += [z.repeat(1, 2)[:, :40] for z in zs[2:]]
    assert sacl_xd_loss(*strided, **arguments)[0].item() == expected.item()
    grads = [torch.autograd.grad(expected, zs[:2], retain_graph=True) for _ in range(2)]
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)  # same input, same bits
    with torch.no_grad():
        assert sacl_xd_loss(*zs, **arguments)[0].item() == expected.item()
        zs[2][3, 1] = float("nan")
        assert sacl_xd_loss(*zs, **arguments)[0].isnan()


@device_test
@pytest.mark.parametrize("shape", [(42, 50), (42, 20)], ids=str)
def test_a_rank_s_rows(shape):
    """The rows of the middle of three ranks, with sums over ranks that are given."""
    from sacl_kernels import xcorr_loss as kernels

    batch = [z.detach() for z in embeddings(*shape, dtype=torch.float32, device=DEVICE)]
    terms = Terms(0.9, 0.02, 0.003, False, 1e-5)
    grad = torch.ones((), device=DEVICE)
    results = []
    for implementation in (xcorr_loss_reference, kernels):
        summed: list[torch.Tensor] = []

        def note(x, summed=summed):  # a rank alone: its share stands for the sum
            summed.append(x.clone())

        rows = Rows(14, 14, note)
        if shape[0] <= shape[1]:
            loss, parts, saved = implementation.gram_forward(batch, rows, terms, keep=True)
            grads = [implementation.gram_backward(grad, saved, rows, terms)]
        else:
            loss, parts, grads = implementation.tiles(batch, rows, terms, keep=True)
        results.append([loss, parts, *grads, *(x.flatten() for x in summed)])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


@device_test
def test_the_operator_keeps_the_rules_of_torch_library():
    for algorithm, keep in (("gram", True), ("gram", False), ("tiles", True)):
        zs = embeddings(6, 9, torch.float32, DEVICE)
        batch = [z.detach().clone() for z in zs]
        z1, z2 = (z.detach().requires_grad_(keep) for z in zs[:2])
        terms = [1.0, 0.02, 0.1, 0.0, 1e-5]
        torch.library.opcheck(
            _xcorr_loss, (z1, z2, batch, [0, 1], terms, algorithm, "triton", keep)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 2048), (1024, 512)], ids=str)
def test_in_a_cuda_graph(shape):
    criterion = SaclXdLoss(backend="triton")
    zs = embeddings(*shape, dtype=torch.bfloat16, device="cuda")

    def step():
        for z in zs:
            z.grad = None
        loss, _ = criterion(*zs)
        loss.backward()
        return loss.detach()

    graph, loss = captured(step)
    fresh = embeddings(*shape, dtype=torch.bfloat16, device="cuda", seed=1)
    with torch.no_grad():
        for z, new in zip(zs, fresh, strict=True):
            z.copy_(new)
    graph.replay()
    expected, _ = criterion(*fresh)
    expected.backward()
    assert loss.item() == expected.item() and (zs[0].grad == fresh[0].grad).all()


@pytest.mark.gpu
def test_at_most_six_launches_forward_and_backward():
    criterion = SaclXdLoss(backend="triton")
    zs = embeddings(256, 2048, torch.bfloat16, "cuda")
    ones = torch.ones((), device="cuda")

    def forward_and_backward():
        loss, _ = criterion(*zs)
        torch.autograd.grad(loss, zs[:2], ones)

    forward_and_backward()  # compiles what is launched
    launches = kernel_launches(forward_and_backward)
    assert 5 <= len(launches) <= 6, launches


@device_test
@pytest.mark.parametrize("kernel", ["gram_backward", "tiles"])
def test_the_self_check_passes_and_finds_a_wrong_gradient(kernel, monkeypatch):
    from sacl_kernels import xcorr_loss as kernels

    verify("xcorr_loss", "triton", torch.device(DEVICE))
    own = getattr(kernels, kernel)

    def off(*given, **options):
        out = own(*given, **options)
        gradients = out if kernel == "gram_backward" else out[2][0]
        gradients[1, -1, -1] *= 1.5
        return out

    monkeypatch.setattr(kernels, kernel, off)
    with pytest.raises(Wrong, match=rf"gradient of z2 \({kernel.removesuffix('_backward')}\)"):
        verify("xcorr_loss", "triton", torch.device(DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="this is it")
def test_all_of_this_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_the_interpreter_refuses_bf16():
    with pytest.raises(ValueError, match="bf16"):
        sacl_xd_loss(*embeddings(6, 9, torch.bfloat16), backend="triton")
