"""Settings of how a step is computed. But for rounding and ``accumulate``, none changes what is
trained."""

from __future__ import annotations

from dataclasses import dataclass

from sacl_fast.checks import Count, Settings
from sacl_fast.config.choices import GradientType, PlanSetting, Switch


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings, path="engine"):
    """How a step is computed, with equal results up to rounding but for 'accumulate'."""

    plan: PlanSetting = "auto"
    """'eager': the dense passes as the model's code says, the slim ones in 'slim.mode'. 'compile':
    by torch.compile. 'dense+mask', 'dense+skip': dense passes recorded on our operators, slim ones
    in that mode; on a GPU 'dense+skip' fuses batch norms into all but 1x1 convolutions. 'fused':
    both recorded, batch norms fused into the convolutions around them (needs a GPU to pay). 'auto':
    on GPUs, the fastest of these, tried on the run's own shapes before the first step and
    remembered; on a CPU 'dense+skip' for encoders with depthwise convolutions, where
    'slim.mode auto' is 'skip'; elsewhere 'eager'."""
    gradient_type: GradientType = "fp32"
    """Among several processes: the type that gradients are sent in. 'bf16' sends half as many bytes
    and rounds each gradient to 8 bits before the average; for slow networks between machines."""
    cuda_graph: Switch = "auto"
    """Whether a step, from its passes to the update, is captured as one CUDA graph, which the host
    launches at once. 'auto': on one GPU. 'on': on several, too. Captured anew where sizes change
    (in mode 'skip', with the filters); what cannot be captured runs as ever, and the log says why.
    """
    accumulate: Count = 1
    """Parts that a step's batch is computed in, one after the other, to take less memory; the
    gradient is the mean of theirs. Batch norms and the loss's correlations are those of a part, so
    that this is not a step on the whole batch, and running statistics move once a part."""
    activation_checkpointing: bool = False
    """Passes with gradient keep what goes in and out of the encoder's blocks only, and compute the
    rest again in backward: less memory for more time."""
