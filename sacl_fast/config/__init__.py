"""The whole configuration of a run: frozen, keyword-only dataclasses.

Every value is checked where it is made, saved with the run as 'config.yaml', and is an
option of the command line ('--optim.lr 0.4'), which is generated from these classes. No torch
here: 'sacl-fast --help' and a mistyped option answer at once.

A new setting is a field with a docstring in one of the files here; its annotation is its rule
('sacl_fast/checks.py'). What is chosen by name stands in 'choices.py'.
"""

from sacl_fast.config.choices import Backend
from sacl_fast.config.data import DaliConfig, DataConfig, ViewConfig, ViewsConfig
from sacl_fast.config.engine import EngineConfig
from sacl_fast.config.method import EncoderConfig, LossConfig, ProjectorConfig, SlimConfig
from sacl_fast.config.run import Config, to_dict, warmup_as_trained
from sacl_fast.config.training import CheckpointConfig, EvalConfig, LogConfig, OptimConfig

__all__ = [
    "Backend",
    "CheckpointConfig",
    "Config",
    "DaliConfig",
    "DataConfig",
    "EncoderConfig",
    "EngineConfig",
    "EvalConfig",
    "LogConfig",
    "LossConfig",
    "OptimConfig",
    "ProjectorConfig",
    "SlimConfig",
    "ViewConfig",
    "ViewsConfig",
    "to_dict",
    "warmup_as_trained",
]
