"""What the allocator keeps: bodies of some MB come and go, and so would their pages.

glibc gives memory at the end of its heap back at once; to get it again costs a page fault for
every 4 KB and the clearing of it. Kept: a plain answer of 10 MB takes 9.4 ms of CPU instead of
15.5 (`big-answers`). A worker keeps at most `_KEPT_BYTES` that nobody uses.
"""

import ctypes
import sys

_KEPT_BYTES = 64 * 1024 * 1024
_LARGEST_ON_HEAP = 32 * 1024 * 1024  # the most that glibc takes; larger blocks come from mmap
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """For this process; where there is no `mallopt` nothing changes."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        set_option(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
