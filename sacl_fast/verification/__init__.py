"""Each operator that is not plain PyTorch, held against it on a few small, odd cases.

``ops/self_check`` asks whether an operator is right on a user's machine, and remembers. What it
asks is answered here, in a process of its own (``child``), since a kernel that is wrong may take
the process with it, or its use of the GPU. Tests ask the same in their own process.
"""

from sacl_fast.verification.comparison import Wrong
from sacl_fast.verification.verify import verify

__all__ = ["Wrong", "verify"]
