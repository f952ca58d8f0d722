"""Thresholds of Python's cyclic garbage collector.

Reference counting already frees nearly all objects: the registration of 200 nodes leaves no cycle.  The collector's
scans cost time nevertheless.  With the defaults (700 new objects, 10, 10), they take more than half of the time in
which a manager processes the reports of 1,500 nodes, because the objects of such a burst reach the oldest generation,
which is scanned as a whole.
"""

import ctypes
import gc

YOUNG_OBJECTS_MAX = 5_000
"""Number of new objects, minus freed ones, that triggers a scan.

When thousands of nodes register, all new objects survive, and the scan blocks the event loop for half a microsecond per
object.
"""

MIDDLE_LOOKS = 2
"""Number of young scans per scan of the middle generation, which must stay short as well."""

OLD_LOOKS = 1_000
"""Number of middle scans per scan of all objects that are not frozen.  Such a scan takes 25 ms per 1,000 nodes, so it
must be rare.
"""


def configure_gc() -> None:
    """Freeze everything loaded so far, so that it is never scanned again, and scan the rest less often.

    Call it once, after a process has loaded its long-lived objects.
    """
    freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, MIDDLE_LOOKS, OLD_LOOKS)


def freeze() -> None:
    """Free unreferenced objects, return their memory to the kernel, and exclude all others from collections.

    Memory that is never scanned again stays shared with forked processes.  New objects are scanned less often from now
    on.  Imports without collections would be 15 % faster, but leave holes that take 3 MiB of a manager's memory.
    """
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
    gc.set_threshold(YOUNG_OBJECTS_MAX)
