"""What a run is held against before anything is opened, and what is said of it before it starts.

Each setting by itself is checked where it is made (``checks``); here is what depends on the
machine, or on how many images there are.
"""

from __future__ import annotations

from collections.abc import Iterator

from sacl_fast.checks import check, counted
from sacl_fast.config import Config
from sacl_fast.config.run import check_parts
from sacl_fast.data.loading.workers import worker_count
from sacl_fast.engine.launch import read_launch
from sacl_fast.errors import UserError
from sacl_fast.files import user_path
from sacl_fast.machine import usable_memory

_LEFT_OUT = 0.1  # of an epoch's images: so many are worth a word


def check_run(config: Config) -> None:
    """Refuse what this machine cannot do.

    Raises:
        UserError: more processes or weights than it can have, a path in a home folder that is
            not known.
    """
    check(config, Config, "the configuration")
    paths = {
        "out": config.out,
        "data.root": config.data.root,
        "data.cache_dir": config.data.cache_dir,
        "encoder.pretrained": None
        if config.encoder.pretrained == "timm"
        else config.encoder.pretrained,
        "resume": None if config.resume in ("auto", "never") else config.resume,
    }
    for name, path in paths.items():
        if path is not None:
            user_path(path, name)
    check_parts(config.batch_size, config.engine.accumulate, read_launch().world_size)
    head = config.projector
    weights = head.hidden * (head.hidden * max(0, head.layers - 2) + head.out)
    memory = usable_memory().total
    if 4 * weights > memory:
        raise UserError(
            f"projector.hidden is {head.hidden} and projector.out {head.out}: {4e-9 * weights:.0f} "
            f"GB of weights, and this machine has {1e-9 * memory:.0f} GB of memory; smaller "
            "ones work, such as 2048"
        )
    cores = worker_count(-1)
    most = 16 * (cores + 1)  # more only take memory; a disk far away may keep some waiting
    processes = {
        "data.workers": config.data.workers,
        "data.dali.readers": config.data.dali.readers,
        "data.dali.threads": config.data.dali.threads,
    }
    for name, asked in processes.items():
        if asked > most:
            raise UserError(
                f"{name} is {asked}, and a process has {counted(cores, 'core')} here; at most "
                f"{most} works, "
                "and -1 takes what suits"
            )


def remarks(config: Config, images: int) -> Iterator[str]:
    """Sentences on what a run of so many training images does otherwise than one might think."""
    asked, used = config.optim.warmup_epochs, config.warmup_epochs
    if used != asked:
        yield (
            f"the warm-up of {counted(asked, 'epoch', 'g')} (optim.warmup_epochs) is not "
            f"shorter than the run of "
            f"{config.epochs}: using a tenth of the run, {counted(used, 'epoch', 'g')}"
        )
    steps, left_out = divmod(images, config.batch_size)
    if not steps:
        yield (
            f"0 steps an epoch: batch_size is {config.batch_size}, but there "
            f"{'is' if images == 1 else 'are'} only "
            f"{counted(images, 'training image')}; at most {images:,} works"
        )
    elif left_out >= _LEFT_OUT * images:
        sizes = range(config.batch_size, max(2, config.batch_size // 2) - 1, -1)
        better = min(sizes, key=lambda size: images % size)
        yield (
            f"each epoch leaves out {left_out:,} of {counted(images, 'image')} "
            f"({100 * left_out / images:.0f} %), other ones each time, since they fill no batch of "
            f"{config.batch_size}; batch_size {better} leaves out {images % better or 'none'}"
        )
