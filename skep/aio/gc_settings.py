"""Thresholds of Python's cyclic garbage collector.

Reference counts free nearly all objects: 200 registering nodes leave no cycle.  The collector costs time for its scans.
With the defaults (700 new objects, 10, 10) they take more than half of the processor time in which a manager processes
the reports of 1,500 nodes, because a burst's objects move to the oldest generation, which is scanned as a whole.
"""

import ctypes
import gc

YOUNG_OBJECTS_MAX = 5_000
"""New minus freed objects between two scans.

When thousands of nodes register, all new objects stay, and a scan blocks the event loop for half a microsecond each.
"""

MIDDLE_LOOKS = 2
"""Young scans per scan of the middle generation, which also has to be short."""

OLD_LOOKS = 1_000
"""Middle scans per scan of all objects that are not frozen.  That takes 25 ms per 1,000 nodes, so it has to be rare."""


def configure_gc() -> None:
    """Freeze everything loaded so far, so that it is never scanned again, and scan the rest less often.

    Call it once, after a process has loaded its long-lived objects.
    """
    freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, MIDDLE_LOOKS, OLD_LOOKS)


def freeze() -> None:
    """Free unreferenced objects, return their memory to the kernel, and exclude all others from collections.

    Memory that is never scanned again stays shared with forked processes.
    """
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
