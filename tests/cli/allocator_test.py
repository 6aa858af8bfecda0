import subprocess
import sys

import pytest

pytestmark = pytest.mark.heavy

TAKE_AND_FREE = """
import resource, sys
import numpy as np
from dcjax.cli.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones(64 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems' allocators are left as they are")
def test_blocks_that_were_freed_are_found_again_without_page_faults():
    counted = subprocess.run([sys.executable, "-c", TAKE_AND_FREE], capture_output=True, text=True, check=True).stdout
    usual, kept = map(int, counted.split())
    # 8 blocks of 64 MiB, more than glibc ever keeps by itself: 131,072 pages, or 256 large ones
    assert usual >= 256
    assert kept < usual / 10
