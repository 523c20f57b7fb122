"""Memory that is freed is kept for the next step, where the C library would hand it back to the system and fetch it again.

A training step on a CPU allocates and frees gigabytes in pieces that are larger than what glibc keeps. Each piece then comes as fresh
pages, which the kernel has to clear: half of the time of such a step. An accelerator's allocator keeps its memory by itself.
"""

import ctypes
import os
import platform
import sys


# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST = 2**31 - 1  # bytes; what mallopt's argument can hold
TOP_PAD = 2**28  # bytes by which the heap grows at least, so that it grows seldom
# By these, or by another allocator in glibc's place, whoever started the process has decided already.
DECIDED_BY = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees, from now on. The process then stays as large as it once was.

    Called where training, probing, tagging and benchmarks begin on a CPU. It does nothing where the C library is another, or where the
    environment has already said how memory is to be allocated, by one of `DECIDED_BY`.

    Returns:
        Whether it was done.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in DECIDED_BY):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No piece in pages of its own, however large: a threshold as large as that is refused by glibc before 2.35.
    options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, TOP_PAD))
    return all(mallopt(option, value) == 1 for option, value in options)


__all__ = ["keep_freed_memory"]
