"""The loss against a float64 transcription of the supplement's pseudocode, variant by variant."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sacl_fast.errors import UserError
from sacl_fast.losses import BarlowTwinsLoss, SaclXdLoss
from sacl_fast.ops.xcorr_loss import sacl_xd_loss

ALPHA, LAMBDA, GAMMA = 0.9, 0.02, 0.003
# N > D and N < D take different algorithms; odd sizes, and the smallest batch there is.
SHAPES = [(2, 3), (7, 5), (8, 33), (33, 8), (64, 64)]


def pseudocode(z1, z2, z1_t, z2_t, *, distillation, off_diagonal, pairing, variance):
    """The supplement's listing, one line each, with the variants of the design."""

    def norm(z):
        if variance == "unbiased":
            return (z - z.mean(0)) / z.std(0)
        return (z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + 1e-5)

    def correlation(p, q):
        return norm(p).T @ norm(q) / len(p)

    def off(c, power):
        return (c - torch.diag(torch.diag(c))).pow(power).sum()

    c = correlation(z1, z2)
    contrastive = (torch.diag(c) - 1).pow(2).sum() + LAMBDA * off(c, 2)
    if distillation == "none":
        return contrastive
    if pairing == "cross_width":
        z1_t, z2_t = z2_t, z1_t
    if distillation == "log":
        terms = [
            -(t.softmax(1) * z.log_softmax(1)).sum(1).mean() for z, t in [(z1, z1_t), (z2, z2_t)]
        ]
        return contrastive + GAMMA * sum(terms) / 2
    power = 2 if off_diagonal == "squared" else 1
    distilled = LAMBDA / 2 * (off(correlation(z1, z1_t), power) + off(correlation(z2, z2_t), power))
    return ALPHA * contrastive + (1 - ALPHA) * distilled


def embeddings(n, d, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    zs = [torch.randn(n, d, generator=generator, dtype=dtype) for _ in range(4)]
    zs[1] = 0.7 * zs[0] + zs[1]  # some correlation, as in training
    return [z.requires_grad_(i < 2) for i, z in enumerate(zs)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("distillation", "off_diagonal", "pairing", "variance"),
    [
        *itertools.product(
            ["correlation"],
            ["squared", "literal"],
            ["same_width", "cross_width"],
            ["biased", "unbiased"],
        ),
        *itertools.product(["log"], ["squared"], ["same_width", "cross_width"], ["biased"]),
        ("none", "squared", "same_width", "biased"),
        ("none", "squared", "same_width", "unbiased"),
    ],
)
def test_value_and_gradient_equal_the_pseudocode(
    shape, distillation, off_diagonal, pairing, variance
):
    variant = dict(
        distillation=distillation, off_diagonal=off_diagonal, pairing=pairing, variance=variance
    )
    ours, theirs = embeddings(*shape), embeddings(*shape)
    loss, parts = sacl_xd_loss(*ours, alpha=ALPHA, lambda_=LAMBDA, gamma=GAMMA, **variant)
    expected = pseudocode(*theirs, **variant)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sum(parts), loss.detach(), rtol=1e-12, atol=1e-12)
    for z, z_ref in zip(ours[:2], theirs[:2], strict=True):
        # With N = 2 and no eps the standardised values are +-c and the true gradient is 0.
        scale = z_ref.grad.abs().max().clamp(min=1e-2)
        torch.testing.assert_close(z.grad / scale, z_ref.grad / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
def test_narrow_types_stay_close(shape, dtype, tolerance):
    exact = embeddings(*shape)
    narrow = [z.detach().to(dtype).requires_grad_(z.requires_grad) for z in exact]
    expected, _ = sacl_xd_loss(*exact)
    loss, _ = sacl_xd_loss(*narrow)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    loss.backward()
    expected.backward()
    for z, z_ref in zip(narrow[:2], exact[:2], strict=True):
        error = (z.grad.double() - z_ref.grad).norm() / z_ref.grad.norm()
        assert error < tolerance


def test_targets_get_no_gradient():
    zs = [z.detach().requires_grad_() for z in embeddings(8, 6)]
    sacl_xd_loss(*zs)[0].backward()
    assert zs[0].grad is not None and zs[1].grad is not None
    assert zs[2].grad is None and zs[3].grad is None


def test_the_loss_ignores_autocast():
    zs = embeddings(16, 24, torch.float32)
    expected, _ = sacl_xd_loss(*zs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = sacl_xd_loss(*zs)
    assert loss.item() == expected.item()


def test_a_dead_feature_costs_one_and_gives_no_nan():
    zs = embeddings(16, 4)
    dead = [z.detach().clone() for z in zs]
    for z in dead:
        z[:, 0] = 3.0
    dead[0].requires_grad_()
    loss, _ = sacl_xd_loss(*dead, alpha=1.0, lambda_=0.0)
    rest, _ = sacl_xd_loss(*[z[:, 1:] for z in dead], alpha=1.0, lambda_=0.0)
    torch.testing.assert_close(loss, rest + 1)
    loss.backward()
    assert torch.isfinite(dead[0].grad).all()


def test_a_nan_is_reported_as_nan():
    zs = embeddings(8, 4)
    zs[2].data[3, 1] = float("nan")
    assert sacl_xd_loss(*zs)[0].isnan()


def test_scale_multiplies_loss_and_parts():
    zs = embeddings(8, 4)
    loss, parts = sacl_xd_loss(*zs)
    scaled, scaled_parts = sacl_xd_loss(*zs, scale=0.1)
    torch.testing.assert_close(scaled, 0.1 * loss)
    torch.testing.assert_close(torch.stack(scaled_parts), 0.1 * torch.stack(parts))


def test_modules_are_thin():
    zs = embeddings(8, 12)
    module = SaclXdLoss(alpha=0.8, distillation="log")
    torch.testing.assert_close(module(*zs)[0], sacl_xd_loss(*zs, alpha=0.8, distillation="log")[0])
    norm = [F.batch_norm(z, None, None, training=True) for z in zs[:2]]
    c = norm[0].T @ norm[1] / 8
    off = c - torch.diag(torch.diag(c))
    expected = (1 - torch.diag(c)).square().sum() + 0.01 * off.square().sum()
    torch.testing.assert_close(BarlowTwinsLoss(lambda_param=0.01)(zs[0], zs[1]), expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([torch.randn(4, 3), torch.randn(4, 2)], r"\(4, 3\), \(4, 2\)"),
        ([torch.randn(4), torch.randn(4)], "matrices of one shape"),
        ([torch.randn(1, 3), torch.randn(1, 3)], "batch of 1"),
    ],
)
def test_bad_embeddings_are_named(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        sacl_xd_loss(*arguments, distillation="none")


def test_distillation_needs_its_targets():
    with pytest.raises(UserError, match="needs z1_t and z2_t"):
        sacl_xd_loss(torch.randn(4, 3), torch.randn(4, 3))
