from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from dreambooth.training import host_allocator

# This runs in a process of its own, because the setting cannot be undone.
FAULTS = """
import ctypes, resource, sys
from dreambooth.training import host_allocator
if sys.argv[1] == "keep":
    assert host_allocator.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
SIZE = 16 * 2**20
def step():
    held = [libc.malloc(SIZE) for _ in range(4)]
    for place in held:
        libc.memset(place, 1, SIZE)
    for place in held:
        libc.free(place)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_used_again() -> None:
    plain, kept = faults("plain"), faults("keep")
    assert kept < 100 < plain


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        def __init__(self, name: str | None) -> None:
            assert name is None

    monkeypatch.setattr(ctypes, "CDLL", Musl)
    assert host_allocator.keep_freed_memory() is False
