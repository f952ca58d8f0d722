"""When Python's collector of cycles looks at what a process holds.

Reference counts free nearly all of ours: 200 nodes that register leave no cycle behind.  What the collector costs is
looking: with the defaults (700 new objects, 10, 10) more than half of the processor time in which a manager takes the
reports of 1,500 nodes, since what a burst has in hand moves to the oldest generation, and that is looked at in whole.
"""

import gc

YOUNG_OBJECTS_MAX = 5_000
"""New objects, less those that went, between two looks.  When thousands of nodes register all of them stay, and the
loop is held for half a microsecond for each."""

MIDDLE_LOOKS = 2
"""After so many of them comes one at all that stayed since the last such one; it has to be short, too."""

OLD_LOOKS = 1_000
"""After so many of those comes one at all that is not settled: 25 ms for each 1,000 nodes, so it has to be rare."""


def settle() -> None:
    """Call it when a process has loaded what it keeps: that is never looked at again, and the rest less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, MIDDLE_LOOKS, OLD_LOOKS)
