"""Memory that a CPU process frees is kept for its next step, where the C library would return it to the system and fetch it again.

A training step allocates and frees gigabytes in pieces larger than what glibc keeps. Each then comes as fresh pages, which the kernel has
to clear: half of the time of such a step. Accelerators keep their memory by themselves.
"""

import ctypes
import os
import platform
import sys


# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST = 2**31 - 1  # bytes; what mallopt's argument can hold
TOP_PAD = 2**28  # bytes by which the heap grows at least, so that it grows seldom
# Whoever started the process has decided already, by one of these or by another allocator in place of glibc's.
DECIDED_BY = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees, from now on: it stays as large as it once was. Programs that compute on a CPU call this.

    Returns:
        Whether it was done: not with another C library, nor where the environment has one of `DECIDED_BY`.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in DECIDED_BY):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No piece in pages of its own, however large: glibc before 2.35 rejects a threshold as large as that.
    options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, TOP_PAD))
    return all(mallopt(option, value) == 1 for option, value in options)
