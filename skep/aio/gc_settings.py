"""Thresholds of Python's garbage collector of cycles.

Reference counts free nearly all objects: 200 nodes that register leave no cycle behind.  The cost of the collector is
its scans: with the defaults (700 new objects, 10, 10) they take more than half of the processor time in which a manager
processes the reports of 1,500 nodes, since objects of a burst move to the oldest generation, which is scanned in whole.
"""

import ctypes
import gc

YOUNG_OBJECTS_MAX = 5_000
"""New objects, less freed ones, between two scans.  When thousands of nodes register all of them stay, and the
event loop is blocked for half a microsecond for each."""

MIDDLE_LOOKS = 2
"""Young scans before one of the middle generation, which has to be short, too."""

OLD_LOOKS = 1_000
"""Middle scans before one of all objects that are not frozen: 25 ms for each 1,000 nodes, so it has to be rare."""


def configure_gc() -> None:
    """Call it once a process has loaded what it keeps: that is never scanned again, and the rest less often."""
    freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, MIDDLE_LOOKS, OLD_LOOKS)


def freeze() -> None:
    """Free what nothing refers to, return it to the kernel, and exclude the rest from all collections.

    What is never scanned again stays shared with the processes that are forked from this one.
    """
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
