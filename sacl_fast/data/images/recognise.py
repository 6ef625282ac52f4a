"""What a folder or file of images is, by what lies in it: the ``data.source`` that opens it."""

from __future__ import annotations

import os
from pathlib import Path

from sacl_fast.config.choices import SourceName
from sacl_fast.data.images.pixel_file import is_cache
from sacl_fast.data.images.voc import find_voc
from sacl_fast.errors import UserError, reason_and_remedy
from sacl_fast.files import kind_of

_CIFAR: dict[str, SourceName] = {
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
}


def source_of(root: Path) -> SourceName:
    """``cache`` for a file of decoded images; ``cifar10`` and ``cifar100`` for torchvision's
    copies, ``voc2007`` for its official layout, ``webdataset`` for a folder of .tar shards and
    nothing else; ``folder`` for what else there is, which says what is wrong with it.

    Raises:
        UserError: it cannot be read.
    """
    kind = kind_of(root)
    if kind != "folder":
        return "cache" if kind == "file" and is_cache(root) else "folder"
    for name, source in _CIFAR.items():
        if root.name == name or kind_of(root / name) == "folder":
            return source
    if find_voc(root) is not None:
        return "voc2007"
    try:
        names = [name for name in os.listdir(root) if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {reason_and_remedy(error)}") from None
    shards = [name for name in names if name.endswith(".tar")]
    folders = any(kind_of(root / name) == "folder" for name in names if name not in shards)
    return "webdataset" if shards and not folders else "folder"
