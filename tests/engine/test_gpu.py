"""The same runs on a CUDA device: values against the CPU, and every precision end to end."""

from dataclasses import replace

import pytest
import torch

import sacl_fast
from sacl_fast.encoders import build_encoder
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.plan import try_plans
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import RecordedEncoder, choose_passes
from sacl_fast.slim import Slicer
from tests.modules import channels_last

pytestmark = pytest.mark.gpu


def first_step(config, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ranks = Ranks(0, 1, torch.device(device))
    passes = choose_passes(config, ranks.device, steps_per_epoch=3)
    step = TrainingStep(build_method(config, passes), config, ranks, steps_per_epoch=3)
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 16, 3, 16, 16, generator=generator).to(device)
    loss, *_ = step.criterion(*step.four_passes(a, b))
    step.backward(loss)
    return loss.item(), {k: p.grad.cpu() for k, p in step.method.named_parameters()}


@pytest.mark.usefixtures("full_precision")
def test_loss_and_gradients_equal_the_cpus(tiny):
    tiny = replace(tiny, precision="fp32", encoder=replace(tiny.encoder, drop_path=0.0))
    expected, expected_grads = first_step(tiny, "cpu")
    loss, grads = first_step(tiny, "cuda")
    assert loss == pytest.approx(expected, rel=1e-4)
    largest = max(g.abs().max() for g in expected_grads.values())
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() / largest < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_slim_passes(dtype):
    """Their backward runs, and is recorded, in a thread of autograd's."""
    torch.manual_seed(0)
    encoder = build_encoder("mobilenetv3_small_100", image_size=64).cuda()
    encoder = channels_last(encoder)
    slicer, gradients, skipped = Slicer(encoder, 0.5), [], []
    mode = slicer.mode
    slicer.mode = lambda name: skipped.append(name) or mode(name)  # type: ignore
    recorded, x = RecordedEncoder(slicer), torch.randn(8, 3, 64, 64, device="cuda")
    for step in range(6):
        encoder.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            if step == 0:
                with slicer.mode("skip"):
                    out = encoder(x)
            else:
                out = recorded(x)
        out.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-2 * gradients[0].norm()
    assert len(skipped) < 5  # the last ones ran from the recording


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv3_large_100", "resnet50"])
def test_every_plan_is_as_exact_as_the_eager_one(tiny, name, precision):
    """``try_plans`` leaves out one that is not."""
    config = replace(
        tiny,
        precision=precision,
        batch_size=32,
        encoder=replace(tiny.encoder, name=name, width=1.0, stem="imagenet", drop_path=0.0),
        views=replace(tiny.views, size=64),
    )
    passes = choose_passes(config, torch.device("cuda"), steps_per_epoch=100)
    ranks = Ranks(0, 1, torch.device("cuda"))
    step = TrainingStep(build_method(config, passes), config, ranks, steps_per_epoch=100)
    trials = try_plans(config, step)
    assert all(t.milliseconds for t in trials if t.plan != "compile"), list(map(str, trials))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_runs_finish_and_resume(tiny, precision):
    tiny = replace(tiny, device="cuda", precision=precision)
    result = sacl_fast.train(replace(tiny, epochs=1))
    resumed = sacl_fast.train(replace(tiny, resume="auto"))
    assert result.steps == 3 and resumed.steps == 6
    rows = [r for r in read_metrics(resumed.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert all(r["loss"] is not None for r in rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("plan", ["eager", "dense+skip", "fused"])
@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_replays_of_a_graph_train_as_steps_do(tiny, plan, precision, optimizer):
    """To the bit where algorithms are deterministic; and the host waits for nothing."""
    config = replace(
        tiny,
        precision=precision,
        epochs=50,
        batch_size=32,
        encoder=replace(tiny.encoder, name="mobilenetv1_100", stem="imagenet"),
        views=replace(tiny.views, size=64),
        optim=replace(tiny.optim, name=optimizer),
    )
    losses = {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for setting in ("off", "on"):
            engine = replace(config.engine, plan=plan, cuda_graph=setting)
            own = replace(config, engine=engine)
            torch.manual_seed(0)
            ranks = Ranks(0, 1, torch.device("cuda", 0))
            passes = choose_passes(own, ranks.device, steps_per_epoch=100)
            step = TrainingStep(build_method(own, passes), own, ranks, steps_per_epoch=4)
            views = torch.randn(2, 32, 3, 64, 64, device="cuda")
            a, b = (v.contiguous(memory_format=torch.channels_last) for v in views)
            losses[setting] = []
            for i in range(12):
                if i == 6:
                    torch.cuda.set_sync_debug_mode("error")
                losses[setting].append(step(a, b, i)[0].clone())
            torch.cuda.set_sync_debug_mode("default")
            assert (step.graph is not None) == (setting == "on")
            assert step.graph is None or step.graph.replays == 7
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.stack(losses["on"]), torch.stack(losses["off"]))
