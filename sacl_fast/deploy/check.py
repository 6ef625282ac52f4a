"""Whether an exported file gives the features of the encoder that it was made of, and how fast."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sacl_fast.deploy.graph import Runner

# Of float32: rounding that another order of summation brings stays far below both.
LARGEST_DIFFERENCE, LOWEST_COSINE = 1e-3, 0.9999
# Of int8, which rounds each weight and activation: a mean over the images.
LOWEST_COSINE_INT8 = 0.9
# Of an encoder that multiplies rounding: as many times its own distance from float64, since the
# file's is another one of that size, unless that is larger than this.
_ROUNDINGS, _LARGEST_ROUNDING = 4, 1e-2


@dataclass(frozen=True)
class Parity:
    """How near features (N, F) are to those of the reference."""

    difference: float
    """Largest one, over the largest absolute value of the reference."""
    cosine: float
    """Of an image's two feature vectors, the lowest over the images."""
    mean_cosine: float

    def obstacle(self, *, int8: bool = False, rounding: Parity | None = None) -> str | None:
        """Why the file is not to be used; None if it is.

        Args:
            rounding: how near the encoder is to itself in float64, if it was looked at.
        """
        if int8:
            if self.mean_cosine >= LOWEST_COSINE_INT8:
                return None
            return f"a mean cosine of {self.mean_cosine:.3f}, below {LOWEST_COSINE_INT8}"
        difference, cosine, of_itself = LARGEST_DIFFERENCE, LOWEST_COSINE, ""
        if rounding is not None:
            of_itself = (
                f" (rounding in float32 alone changes the encoder's by {rounding.difference:.1e})"
            )
        if rounding is not None and rounding.difference <= _LARGEST_ROUNDING:
            difference = max(difference, _ROUNDINGS * rounding.difference)
            cosine = min(cosine, 1 - _ROUNDINGS**2 * (1 - rounding.cosine))
        if not self.difference <= difference:
            return (
                f"a largest difference of {self.difference:.1e} of the largest feature, above "
                f"{difference:.0e}{of_itself}"
            )
        if not self.cosine >= cosine:
            return f"a cosine of {self.cosine:.5f}, below {cosine:.4g}{of_itself}"
        return None


@torch.no_grad()
def parity(run: Runner, images: Tensor, features: Tensor) -> Parity:
    """How near a file's features of ``images`` (N, 3, S, S) are to the reference's ``features``
    (N, F); NaN where some are not finite.

    The images are run as a batch of one and a batch of the others, so that a batch size that was
    fixed by mistake is an error here.
    """
    parts = [part for part in (images[:1], images[1:]) if len(part)]
    ours = torch.cat([run(part) for part in parts]).double()
    features = features.double()
    if ours.shape != features.shape:
        raise RuntimeError(
            f"features {tuple(ours.shape)} where the encoder gives {tuple(features.shape)}"
        )
    largest = features.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    # Over the largest: cosine_similarity takes lengths below 1e-8 for 0.
    cosines = F.cosine_similarity(ours / largest, features / largest, dim=1)  # (N,)
    return Parity(
        difference=((ours - features).abs().max() / largest).item(),
        cosine=cosines.min().item(),
        mean_cosine=cosines.mean().item(),
    )


def rounding_of(encoder: nn.Module, images: Tensor, features: Tensor) -> Parity | None:
    """How near an encoder's float32 ``features`` (N, F) of ``images`` (N, 3, S, S) are to those in
    float64; None where it does not run in that.

    Batch norms of channels that hardly vary multiply what rounding leaves in them by up to 316.
    """
    wide = copy.deepcopy(encoder).double()
    try:
        return parity(lambda part: wide(part.double()), images, features)
    except (RuntimeError, AssertionError, TypeError):
        return None


@torch.no_grad()
def latency(run: Runner, image: Tensor, *, seconds: float = 1.0, most: int = 50) -> float:
    """Median time in milliseconds of a batch ``image`` (1, 3, S, S), over ``seconds`` or ``most``
    runs after a few that are not counted."""
    for _ in range(3):
        run(image)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (len(times) < most and time.perf_counter() < end):
        start = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
