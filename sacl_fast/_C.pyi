from typing import TypedDict

class BuildInfo(TypedDict):
    version: str  # of the package whose sources were compiled
    cxx: str  # compiler and version, such as "gcc 12.2.0"
    cuda: str | None  # toolkit version, such as "13.0"
    architectures: list[str]  # machine code held, such as ["sm_80", "sm_90a"]; empty without CUDA

def build_info() -> BuildInfo: ...
def device_architecture() -> str:
    """The architecture, such as "sm_90", of the code that a kernel ran on the current device.

    Raises RuntimeError where no kernel can run: no CUDA part, no device, no code for it.
    """
