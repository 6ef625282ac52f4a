"""Encoders f (timm's, by name) and the projector h."""

from sacl_fast.encoders.build import build_encoder, output_dim
from sacl_fast.encoders.projector import Projector

__all__ = ["Projector", "build_encoder", "output_dim"]
