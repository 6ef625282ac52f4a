"""Work captured in a CUDA graph, for the tests of operators that must be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(step: Callable[[], T], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of ``step``, and what it returned while it was captured.

    Before that it runs ``warm_up`` times on the stream of the capture. A kernel's code is loaded
    when it is first launched, and cuBLAS takes its memory for a stream at its first product there;
    neither can be part of a graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = step()
    return graph, result
