"""The model among several ranks: gradients are averaged while backward goes on.

One forward of the module holds all passes of a step, so that one backward fills each bucket of
gradients once. A rank's gradient is that of the global loss times the number of ranks
(``ops.collectives``), so the average is exact.
"""

from __future__ import annotations

import warnings

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from sacl_fast.config import Config
from sacl_fast.engine.method import SaclXd


def data_parallel(method: SaclXd, config: Config) -> nn.Module:
    """The method, on its device, as every rank is to call it."""
    # A 1x1 weight lies in memory in two ways at once; DDP copies either and warns of one.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    model = DistributedDataParallel(
        method,
        # Synchronised batch norms have the same statistics on all ranks anyway.
        broadcast_buffers=not config.encoder.sync_batch_norm,
        gradient_as_bucket_view=True,
        # Until slimming starts, the slim encoder's own batch norms have no gradient.
        find_unused_parameters=bool(method.slicer.norms) and config.slim.warmup_epochs > 0,
    )
    if config.engine.gradient_type == "bf16":
        model.register_comm_hook(None, bf16_compress_hook)
    return model
