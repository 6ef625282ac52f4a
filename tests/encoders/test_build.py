"""Encoders by name: what is built runs, what cannot be built says so in a sentence."""

import pytest
import timm
import torch
from torch import nn

from sacl_fast.encoders import Projector, build_encoder, output_dim
from sacl_fast.errors import UserError
from sacl_fast.slim import Slicer
from tests.operators import Operators


@pytest.mark.parametrize(
    ("name", "options", "features"),
    [
        ("mobilenetv1_100", {}, 1024),
        ("mobilenetv1_100", {"width": 2.0}, 2048),
        ("mobilenetv1_100", {"stem": "cifar"}, 1024),
        ("mobilenetv2_100", {"width": 0.5}, 1280),
        ("mobilenetv3_large_100", {}, 1280),
        ("mobilenetv3_small_100", {"width": 0.5, "stem": "stride1"}, 1024),
        ("efficientnet_b0", {"stem": "stride1"}, 1280),
        ("efficientnet_b0", {"width": 0.5}, 640),
        ("resnet50", {"stem": "cifar"}, 2048),
        ("resnet18", {"width": 0.5}, 256),
        ("resnet18d", {"stem": "cifar"}, 512),
        ("regnety_002", {"stem": "cifar"}, 368),
        ("vit_tiny_patch16_224", {"stem": "cifar", "drop_path": 0.1}, 192),
        ("resnet20", {}, 64),
        ("resnet20", {"width": 6}, 384),
    ],
)
def test_features_and_gradients(name, options, features):
    encoder = build_encoder(name, image_size=32, **options)
    out = encoder(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, features) == (2, output_dim(encoder, 32))
    assert encoder.training
    out.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())  # DDP waits for every one


@pytest.mark.parametrize("mode", ["dense", "mask"])
@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv3_small_100", "efficientnet_b0"])
def test_no_activation_copies_its_input(name, mode):
    """As timm builds them they do, in place; values and gradients are the same to the bit."""
    theirs, x = timm.create_model(name, num_classes=0), torch.randn(2, 3, 64, 64)
    encoder = build_encoder(name, image_size=64)
    encoder.load_state_dict(theirs.state_dict())
    results, copies = [], []
    for own in (theirs, encoder):
        torch.manual_seed(0)
        with Operators() as seen, Slicer(own.train(), 0.5).mode(mode):
            out = own(x)
        out.square().sum().backward()
        copies.append(seen.count["clone"])
        results.append([out, *(p.grad for p in own.parameters()), *own.buffers()])
    assert copies[0] > 15 and copies[1] == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_width_one_is_timms_own():
    ours = build_encoder("mobilenetv2_100", image_size=64)
    theirs = timm.create_model("mobilenetv2_100", num_classes=0)
    theirs.load_state_dict(ours.state_dict())
    twice = build_encoder("mobilenetv2_100", width=1.4, image_size=64)
    timms = timm.create_model("mobilenetv2_140", num_classes=0)
    assert {k: v.shape for k, v in twice.state_dict().items()} == {
        k: v.shape for k, v in timms.state_dict().items()
    }


def first_resolution(encoder, size):
    """Side of the first feature map that a block sees."""
    sides = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
    encoder.eval()(torch.zeros(1, 3, size, size))
    return sides[1]


@pytest.mark.parametrize(
    ("name", "stem", "side"),
    [
        ("resnet18", "imagenet", 8),
        ("resnet18", "stride1", 16),
        ("resnet18", "cifar", 32),
        ("mobilenetv1_100", "imagenet", 16),
        ("mobilenetv1_100", "stride1", 32),
        ("mobilenetv1_100", "cifar", 32),
    ],
)
def test_stems_keep_the_resolution(name, stem, side):
    assert first_resolution(build_encoder(name, stem=stem, image_size=32), 32) == side


def test_resnet20_is_the_papers():
    encoder = build_encoder("resnet20", image_size=32)
    convs = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 1 + 18 + 2  # stem, nine blocks of two, two shortcuts
    # He et al., Table 6: 0.27 M with the classifier's 650 and without our shortcuts' 2,752.
    parameters = sum(p.numel() for p in encoder.parameters())
    assert abs(parameters - (269_722 - 650 + 2_752)) < 200


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mobilnetv1_100", {}, "did you mean mobilenetv1_100"),
        ("regnety_002", {"width": 2.0}, "no width multiplier"),
        ("convnext_atto", {"stem": "cifar"}, "patches"),
        ("vgg11", {"drop_path": 0.1}, "drop_path_rate"),
        ("vgg11", {"image_size": 8}, "does not run on 8 px"),
        ("resnet18.a1_in1kk", {}, "no tag 'a1_in1kk' in timm; without one works .* mean a1_in1k"),
        ("resnet18.", {}, "no tag ''"),
        ("xcit_tiny_12_p8_224.x.y", {}, r"no tag 'x\.y'"),
        ("hf-hub:timm/resnet18", {}, "unknown encoder 'hf-hub:timm/resnet18'"),
        ("local-dir:/tmp/x", {}, "unknown encoder"),
        ("", {}, "build_encoder: name is empty"),
        ("x" * 9999, {}, "unknown encoder 'xxx"),
        ("resnet18", {"stem": "cifr"}, r"stem is 'cifr'; .* \(did you mean cifar"),
        ("resnet18", {"width": float("inf")}, "width is inf; a finite number"),
        ("resnet18", {"width": 1000.0}, "from 0.01 to 64 works"),
        ("resnet18", {"image_size": 64.0}, "image_size is 64.0; a whole number"),
        ("resnet18", {"drop_path": 1.0}, "from 0 to below 1"),
        ("halonet_h1", {}, "HaloAttn|does not run on 64 px images with this stem: "),
        ("crossvit_tiny_240", {}, r"does not run on 64 px .*; it was made for 240 px \(views.size"),
    ],
)
def test_what_cannot_be_built(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        build_encoder(name, **{"image_size": 64, **options})


def test_a_known_tag_is_the_model_itself():
    tagged = build_encoder("mobilenetv2_100.ra_in1k", width=0.5, image_size=32)
    plain = build_encoder("mobilenetv2_100", width=0.5, image_size=32)
    assert [p.shape for p in tagged.parameters()] == [p.shape for p in plain.parameters()]


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError(""), IndexError(), KeyError("k")])
def test_errors_without_words(error):
    class Wordless(nn.Linear):
        def forward(self, input):
            raise error

    with pytest.raises(UserError, match=f"Wordless does not run .*: ({type(error).__name__}|'k')"):
        output_dim(Wordless(1, 1), 32)


@pytest.mark.parametrize("features", [torch.zeros(1, 3, 2), (torch.zeros(1, 3),), None])
def test_encoders_without_a_feature_vector(features):
    class Maps(nn.Linear):
        def forward(self, input):
            return features

    with pytest.raises(UserError, match="Maps gives no feature vector"):
        output_dim(Maps(1, 1), 32)


def test_projector():
    projector = Projector(10, hidden=32, out=16, layers=3)
    assert [type(m).__name__ for m in projector] == [
        "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear",
    ]  # fmt: skip
    assert projector(torch.randn(4, 10)).shape == (4, 16)
    assert [type(m).__name__ for m in Projector(10, out=16, layers=1)] == ["Linear"]
