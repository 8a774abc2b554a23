"""Freed memory is asked of the system again, page by page, or is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from infra.allocator import _glibc

TOLD = """
import resource
from infra.allocator import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        b"x" * 48_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

before = resident()
with freed_memory_kept():
    b"x" * 48_000_000
    with freed_memory_kept():
        pass
    print(faults())
print(resident() - before)
print(faults())
print(resource.getpagesize())
"""


@pytest.mark.process
@pytest.mark.skipif(_glibc() is None, reason="not glibc")
def test_what_is_freed_is_used_again_and_then_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", TOLD], check=True, capture_output=True, text=True)
    kept, left, after, page = map(int, done.stdout.split())
    pages = 8 * 48_000_000 // page
    assert kept < pages / 100
    assert left < 8_000_000
    assert after > pages / 2
