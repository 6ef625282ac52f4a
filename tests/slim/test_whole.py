"""Mode ``whole`` against mode ``dense``: whole encoders, everything that training sees."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sacl_fast.encoders import build_encoder
from sacl_fast.ops import batch_norm_act
from sacl_fast.ops.batch_norm_act import ACTIVATIONS
from sacl_fast.passes import RecordedEncoder
from sacl_fast.slim import Slicer
from sacl_fast.slim.slicer import Mode
from tests.modules import channels_last
from tests.slim import test_custom_functions, test_skip_compiled
from tests.slim.test_custom_functions import MIDDLES
from tests.slim.test_skip import assert_equal, encoder_of, observe

EXACT = 1e-9  # in float64, but for the order of summation
ENCODERS = [
    ("mobilenetv1_100", 0.5),
    ("mobilenetv2_100", 0.5),
    ("mobilenetv3_large_100", 0.5),
    ("efficientnet_b0", 0.5),
    ("tf_efficientnet_b0", 1.0),
    ("resnet18", 0.25),
    ("resnet50", 0.25),
    ("regnety_002", 1.0),
    ("resnet20", 6 / 16),
    ("convnext_atto", 1.0),
    ("ghostnet_050", 1.0),
    ("fastvit_t8", 1.0),
    ("vit_tiny_patch16_224", 1.0),
]


def compare(encoder: nn.Module, *, size=33, ratio=0.5, **options) -> None:
    twin = copy.deepcopy(encoder)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    ways: list[tuple[nn.Module, Mode]] = [(encoder, "whole"), (twin, "dense")]
    whole, dense = (observe(e, Slicer(e, ratio, **options), mode, x) for e, mode in ways)
    assert_equal(whole, dense, EXACT)


@pytest.mark.parametrize(("name", "width"), ENCODERS)
def test_training_equals_the_dense_encoder(name, width):
    if name in ("convnext_atto", "fastvit_t8", "vit_tiny_patch16_224"):
        torch.manual_seed(0)
        compare(build_encoder(name, width=width, image_size=64).double().train(), size=64)
    else:
        compare(encoder_of(name, width).train())


@pytest.mark.parametrize("name", ["mobilenetv3_large_100", "resnet18"])
def test_eval_mode(name):
    compare(encoder_of(name, 0.25).eval())


def test_drop_path():
    compare(encoder_of("efficientnet_b0", 0.25, drop_path=0.5).train())


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_separate_norms_are_those_of_the_slim_encoder_alone(ratio):
    encoder = encoder_of("mobilenetv2_100", 0.25).train()
    slicer = Slicer(encoder, ratio, batch_norm="separate").double()
    before = copy.deepcopy(slicer.state_dict())
    with slicer.mode("whole"):
        encoder(torch.randn(2, 3, 33, 33, dtype=torch.float64)).sum().backward()
    for name, value in slicer.state_dict().items():
        assert name == "_extra_state" or torch.equal(value, before[name]), name
    compare(encoder_of("mobilenetv2_100", 0.25).train(), ratio=ratio, batch_norm="separate")


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_functions_of_autograd(middle):
    model, twin, x = test_custom_functions.made(middle)
    dense = copy.deepcopy(model)
    dense(x).sum().backward()
    unused = {n.partition(".")[0] for n, p in dense.named_parameters() if p.grad is None}
    assert_equal(
        observe(model, Slicer(model, 0.5), "whole", x, unused=unused),
        observe(twin, Slicer(twin, 0.5), "dense", x, unused=unused),
        EXACT,
    )


@pytest.mark.skipif(not batch_norm_act.is_compiled(), reason="the compiled module is not built")
@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv3_large_100", "resnet50"])
def test_compiled_operators_are_as_exact_as_the_dense_encoder(name):
    torch.manual_seed(0)
    encoder = channels_last(build_encoder(name, width=0.25, image_size=64).train())
    for norm in encoder.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
    x = torch.randn(6, 3, 64, 64)
    exact = test_skip_compiled.observe(encoder, "dense", "torch", x.double())
    dense = test_skip_compiled.observe(encoder, "dense", "torch", x)
    whole = test_skip_compiled.observe(encoder, "whole", "auto", x)
    for truth, *others in zip(exact, dense, whole, strict=True):
        errors = [((other - truth).norm() / truth.norm()).item() for other in others]
        assert errors[1] < 3 * max(errors[0], 1e-6), errors


class OfImages(TorchDispatchMode):
    """Counts by name the operators that make something for each pixel of each of ``n`` images."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.count = n, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.ndim == 4]
        if any(len(t) == self.n and t.shape[2:] != (1, 1) for t in made):
            self.count[func.overloadpacket.__name__.rstrip("_")] += 1
        return out


@pytest.mark.skipif(not batch_norm_act.is_compiled(), reason="the compiled module is not built")
@pytest.mark.parametrize("mode", ["whole", "skip"])
@pytest.mark.parametrize(
    ("name", "others"),
    [
        # The gradient of a mean over the image, as the norm before it takes it.
        ("mobilenetv1_100", {"clone": 1}),
        ("mobilenetv3_large_100", {"clone": 1}),
        ("efficientnet_b0", {"clone": 1}),
        # After residual sums, where no norm can take it along; strided 1x1 convolutions.
        ("resnet50", {"relu": 16, "clone": 3, "copy": 3}),
    ],
)
def test_activations_run_along_with_norms_and_nothing_is_copied(name, others, mode):
    encoder = channels_last(build_encoder(name, width=0.5, image_size=64)).train()
    recorded = RecordedEncoder(Slicer(encoder, 0.5), mode)
    x = torch.randn(5, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        recorded(x).sum().backward()
    with OfImages(5) as seen:
        recorded(x).sum().backward()
    norms = sum(isinstance(m, _BatchNorm) for m in encoder.modules())
    assert seen.count["batch_norm_act"] >= norms
    copies = {"clone", "copy", "_to_copy", "contiguous", "div", "cat", "scatter", "index_select"}
    unwanted = {*copies, *ACTIVATIONS, "hardtanh"}
    assert {op: n for op, n in seen.count.items() if op in unwanted} == others
