"""Memory that a process keeps from one forward pass to the next, counted in pages fetched."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from pipelines import memory

def fetched():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(3):
        blocks = [np.ones(size << 20, np.uint8) for size in (80, 20)]  # above and below what a thread's arena holds
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

with memory.kept():
    with ThreadPoolExecutor(1) as pool:
        print(pool.submit(fetched).result() and pool.submit(fetched).result(), resident())
print(resident(), memory.keep())
"""


def ran(**environment):
    """Return the pages fetched by a second pass, what the process holds, and in the end, in MiB, and whether kept."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    pages, held, left, kept = ended.stdout.split()
    return int(pages), int(held), int(left), kept == "True"


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library")
def test_pages_are_fetched_once_and_given_back_in_the_end():
    pages, held, left, kept = ran()
    assert kept and pages < 30 and held > left + 90
    pages, held, left, kept = ran(MALLOC_MMAP_THRESHOLD_="1000000")  # whoever runs it knows better
    assert not kept and pages > 100 and held < left + 90
