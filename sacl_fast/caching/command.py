"""``sacl-fast cache IMAGES OUT [options]``. Torch is imported once the options are understood."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from sacl_fast.config.cache import CacheConfig
from sacl_fast.errors import UserError
from sacl_fast.files import user_path
from sacl_fast.output import show_log

logger = logging.getLogger(__name__)

_HELP = (
    "sacl-fast cache IMAGES OUT [options]. IMAGES: what data.root takes (a folder, an archive, a "
    "list; shards with --data.source webdataset; a folder for --data.source cifar10); OUT: a new "
    "file, from which --data.source cache --data.root OUT trains. A command that was ended goes on "
    "where it is given again."
)


def run_cache(args: list[str], parse: Callable[..., CacheConfig]) -> None:
    """Make a cache as the command line says.

    Args:
        parse: ``parse(command, default, args, description=...)``: ``default`` with the options.
    """
    paths = [arg for arg in args[:2] if not arg.startswith("-")]
    if not args or args[0].startswith("-"):
        paths = []
    options = args[len(paths) :] or ["--help"] * (not args)
    config = parse("cache", CacheConfig(), options, description=_HELP)
    if len(paths) < 2:
        raise UserError("cache needs first the images (what data.root takes), then a new file")
    if config.data.root is not None:
        raise UserError(
            f"--data.root is {config.data.root}, and IMAGES is {paths[0]}; IMAGES alone works"
        )
    config = replace(config, data=replace(config.data, root=paths[0]))
    out = user_path(paths[1], "OUT")
    show_log()

    from sacl_fast.caching.make import make_cache
    from sacl_fast.caching.partial import refuse_existing
    from sacl_fast.data.images.manifest import is_image
    from sacl_fast.data.images.open import open_sources
    from sacl_fast.data.images.root import refuse_among_images
    from sacl_fast.engine.signals import StopRequest, ended_by_signals

    refuse_existing(out)
    if is_image(out.name):  # other files among images are not read
        refuse_among_images(out.parent, config.data, "another OUT works")
    with ended_by_signals():
        splits = open_sources(config.data, config.seed)
    stop, kept = StopRequest(), "the same command goes on from what is done"
    with stop.by_signals(
        lambda text: logger.warning("%s", text),
        first=f"stopping; {kept}",
        second=kept,
        work="decoding",
    ):
        make_cache(splits, out, config, check=stop.check)
    print(out)
