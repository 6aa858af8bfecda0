import ctypes
import subprocess
import sys

import pytest

from dcjax.allocator import keep_freed_memory, return_freed_memory

pytestmark = pytest.mark.heavy

TAKE_AND_FREE = """
import resource, sys
import numpy as np
from dcjax.allocator import LARGE, keep_freed_memory

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        # at one time, and so more than glibc keeps by itself
        blocks = [np.ones(size, np.uint8) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
for size in LARGE // 2, 2 * LARGE:
    faults(size)
    print(faults(size))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems' allocators are left as they are")
def test_blocks_that_were_freed_are_found_again_without_page_faults_unless_they_are_large():
    counted = subprocess.run([sys.executable, "-c", TAKE_AND_FREE], capture_output=True, text=True, check=True).stdout
    kept, returned = map(int, counted.split())
    # 64 blocks of 64 MiB are a million pages, or 2,048 large ones
    assert returned >= 2048
    assert kept < returned / 10


def no_library(name):
    raise TypeError(name)


@pytest.mark.parametrize("library", [no_library, lambda name: object()], ids=["none", "another"])
def test_other_c_libraries_are_left_as_they_are(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", library)
    keep_freed_memory()
    return_freed_memory()
