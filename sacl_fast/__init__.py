"""Fast self-supervised pre-training of lightweight vision encoders with SACL-XD.

>>> import sacl_fast
>>> from sacl_fast.presets import get_preset
>>> result = sacl_fast.train(get_preset("demo"))
run folder runs/demo/...
>>> (result.folder / "encoder.safetensors").exists()
True
"""

from typing import TYPE_CHECKING, Any

from sacl_fast._version import __version__

if TYPE_CHECKING:
    from sacl_fast import evaluate
    from sacl_fast.config import Config
    from sacl_fast.deploy.export import export
    from sacl_fast.engine.result import RunResult
    from sacl_fast.engine.trainer import train
    from sacl_fast.evaluation.load import load_encoder
    from sacl_fast.transfer.classifier import load_classifier

__all__ = [
    "Config",
    "RunResult",
    "__version__",
    "evaluate",
    "export",
    "load_classifier",
    "load_encoder",
    "train",
]

_LAZY = {
    "Config": "sacl_fast.config",
    "RunResult": "sacl_fast.engine.result",
    "evaluate": "sacl_fast.evaluate",
    "export": "sacl_fast.deploy.export",
    "load_classifier": "sacl_fast.transfer.classifier",
    "load_encoder": "sacl_fast.evaluation.load",
    "train": "sacl_fast.engine.trainer",
}


def __getattr__(name: str) -> Any:
    """Importing the package imports neither torch nor timm; its names do."""
    if name not in _LAZY:
        raise AttributeError(f"module 'sacl_fast' has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_LAZY[name])
    return module if name == "evaluate" else getattr(module, name)
