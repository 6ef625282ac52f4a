import subprocess
import sys

import pytest

# Pages that the system had to hand out while 120 MB were taken and freed, again and again.
FAULTS = """
import resource, sys, torch
from sacl_fast.engine.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(40 * 2**18) for _ in range(3)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this C library has no such setting")
    return int(done.stdout)


def test_freed_memory_is_used_again():
    pages_of_once = 120 * 2**20 // 4096
    assert faults("keep") < pages_of_once / 10
    assert faults("default") > pages_of_once  # else there is nothing to win
