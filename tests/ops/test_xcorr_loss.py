"""The loss against a float64 transcription of the supplement's pseudocode, variant by variant."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from xcorr_loss_pseudocode import SETTINGS, embeddings, in_float64, pseudocode, relative_errors

from sacl_fast.errors import UserError
from sacl_fast.losses import BarlowTwinsLoss, SaclXdLoss
from sacl_fast.ops.xcorr_loss import _xcorr_loss, sacl_xd_loss

# The smallest batch there is, odd sizes, N > D and N < D, one feature, blocks of the Gram matrices.
SHAPES = [(2, 3), (7, 5), (8, 33), (33, 8), (64, 64), (5, 1), (150, 170)]
ALGORITHMS = ["gram", "tiles"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
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
    shape, distillation, off_diagonal, pairing, variance, algorithm
):
    variant = dict(
        distillation=distillation, off_diagonal=off_diagonal, pairing=pairing, variance=variance
    )
    ours, theirs = embeddings(*shape), embeddings(*shape)
    loss, parts = sacl_xd_loss(*ours, **SETTINGS, **variant, algorithm=algorithm)
    expected = pseudocode(*theirs, **variant)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sum(parts), loss.detach(), rtol=1e-12, atol=1e-12)
    for z, z_ref in zip(ours[:2], theirs[:2], strict=True):
        # With N = 2 and no eps the standardised values are +-c and the true gradient is 0.
        scale = z_ref.grad.abs().max().clamp(min=1e-2)
        torch.testing.assert_close(z.grad / scale, z_ref.grad / scale, rtol=0, atol=1e-9)


def largest_error(zs, exact=None, **kwargs):
    exact = exact or in_float64(zs)
    loss = sacl_xd_loss(*zs, **SETTINGS, **kwargs)[0]
    return max(relative_errors(loss, zs, pseudocode(*exact), exact))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(3, 2), (31, 97), (97, 31), (256, 512), (512, 256)], ids=str)
def test_narrow_types_are_as_good_as_they_can_be(shape, algorithm):
    assert largest_error(embeddings(*shape, dtype=torch.float32), algorithm=algorithm) < 5e-6
    narrow = embeddings(*shape, dtype=torch.bfloat16)
    ours = largest_error(narrow, algorithm=algorithm)
    exact, autocast = in_float64(narrow), [z.detach().requires_grad_() for z in narrow]
    with torch.autocast("cpu", torch.bfloat16):
        eager = pseudocode(*[z.float() for z in autocast])
    theirs = max(relative_errors(eager, autocast, pseudocode(*exact), exact))
    assert ours < 2e-3 and ours <= theirs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_batch_of_two_is_as_exact_as_the_pseudocode(algorithm):
    """Its standardised values are +-1, its gradient is what eps leaves: a difference of equals."""
    zs = embeddings(2, 40, torch.float32)
    plain, exact = [z.detach().requires_grad_() for z in zs], in_float64(zs)
    theirs = max(relative_errors(pseudocode(*plain), plain, pseudocode(*exact), exact))
    assert largest_error(zs, algorithm=algorithm) < 2 * theirs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(40, 90), (90, 40)], ids=str)
def test_features_of_any_offset_and_scale(shape, algorithm):
    zs = embeddings(*shape, dtype=torch.float32)
    offset = [(z.detach() + 1000).requires_grad_(z.requires_grad) for z in zs]
    assert largest_error(offset, algorithm=algorithm) < 1e-3
    scales = torch.logspace(-1, 5, shape[1])
    scaled = [(z.detach() * scales).requires_grad_(z.requires_grad) for z in zs]
    assert largest_error(scaled, algorithm=algorithm) < 5e-6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inputs_need_not_be_contiguous(algorithm):
    zs = [z.detach() for z in embeddings(12, 40, torch.float32)]
    views = [zs[0].T.contiguous().T, zs[1].repeat_interleave(2, 1)[:, ::2], zs[2], zs[3].flip(0)]
    views[3] = views[3].flip(0)
    plain, strided = ([z.requires_grad_(i < 2) for i, z in enumerate(x)] for x in (zs, views))
    expected, got = (sacl_xd_loss(*x, algorithm=algorithm)[0] for x in (plain, strided))
    expected.backward()
    got.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(strided[0].grad, plain[0].grad)
    torch.testing.assert_close(strided[1].grad, plain[1].grad)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_operator_keeps_the_rules_of_torch_library(algorithm):
    for count, dtype in itertools.product((2, 4), (torch.float32, torch.bfloat16, torch.float64)):
        zs = embeddings(6, 9, dtype)
        batch, xd = [z.detach().clone() for z in zs[:count]], 0.1 if count == 4 else 0.0
        terms = [1.0, 0.02, xd, 0.0, 1e-5]
        for keep in (True, False):
            z1, z2 = (z.detach().requires_grad_(keep) for z in zs[:2])
            arguments = (z1, z2, batch, [0, 1], terms, algorithm, "torch", keep)
            torch.library.opcheck(_xcorr_loss, arguments)


@pytest.mark.parametrize("loss", [sacl_xd_loss, SaclXdLoss(alpha=0.8)], ids=["function", "module"])
def test_it_compiles_into_one_graph(loss):
    def loss_of(*zs):
        return loss(*[2 * z for z in zs])[0]

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for shape in [(6, 9), (9, 6)]:
        ours, theirs = embeddings(*shape), embeddings(*shape)
        value, expected = compiled(*ours), loss_of(*theirs)
        value.backward()
        expected.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(ours[0].grad, theirs[0].grad)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_matrix_is_d_by_d(algorithm):
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
            return out

    n, d = 16, 1100
    zs = embeddings(n, d, torch.float32)
    with Largest() as largest:
        sacl_xd_loss(*zs, algorithm=algorithm)[0].backward()
    assert 0 < largest.size < d * d


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_value_gradient_and_repetition(algorithm):
    """Without gradient the value is the same; backward may run twice, with any factor."""
    zs = embeddings(12, 30, torch.float32)
    loss, parts = sacl_xd_loss(*zs, algorithm=algorithm)
    with torch.no_grad():
        alone, _ = sacl_xd_loss(*zs, algorithm=algorithm)
    assert alone.item() == loss.item() and not any(part.requires_grad for part in parts)
    (once,) = torch.autograd.grad(loss, zs[0], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, zs[0])
    torch.testing.assert_close(thrice, 3 * once)


def test_one_embedding_may_be_without_gradient():
    zs = embeddings(8, 12)
    zs[0].requires_grad_(False)
    sacl_xd_loss(*zs)[0].backward()
    assert zs[0].grad is None and zs[1].grad is not None


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
    assert dead[0].grad.isfinite().all()


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


def test_barlow_twins_is_lightly_s():
    lightly = pytest.importorskip("lightly.loss")
    ours, theirs = embeddings(16, 24, torch.float32), embeddings(16, 24, torch.float32)
    loss = BarlowTwinsLoss(lambda_param=0.01)(*ours[:2])
    expected = lightly.BarlowTwinsLoss(lambda_param=0.01)(*theirs[:2])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([torch.randn(0, 3), torch.randn(0, 3)], "batch of 0"),
        ([torch.ones(4, 3, dtype=torch.long)] * 2, "type torch.int64"),
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"algorithm": "grams"}, "algorithm is 'grams'; one of auto, gram, tiles works"),
        ({"distillation": "corelation"}, "did you mean correlation"),
        ({"off_diagonal": "square"}, "did you mean squared"),
        ({"pairing": "samewidth"}, "did you mean same_width"),
        ({"variance": "unbias"}, "did you mean unbiased"),
        ({"statistics": "globl"}, "did you mean global"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"lambda_": float("inf")}, "lambda_ is inf"),
        ({"eps": -1e-5}, "eps is -1e-05"),
        ({"scale": "1"}, "scale is '1', a text; a number works"),
        ({"backend": "tritn"}, "backend is 'tritn'"),
        ({"backend": "triton"}, "float64"),
    ],
)
def test_unknown_ways_are_named(options, sentence):
    with pytest.raises(UserError, match=sentence):
        sacl_xd_loss(*embeddings(4, 3), **options)


def test_embeddings_of_several_devices_are_refused():
    z = torch.randn(4, 3)
    with pytest.raises(UserError, match=r"embeddings on cpu, meta; those of one device work"):
        BarlowTwinsLoss()(z, z.to("meta"))
