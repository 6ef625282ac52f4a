"""Encoders f (timm's, by name), the projector h, and the file of a trained encoder."""

from sacl_fast.encoders.build import build_encoder, output_dim
from sacl_fast.encoders.file import load_encoder, read_encoder_metadata
from sacl_fast.encoders.projector import Projector

__all__ = ["Projector", "build_encoder", "load_encoder", "output_dim", "read_encoder_metadata"]
