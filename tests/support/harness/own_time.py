"""A clock for tests of durations on machines that also do other work."""

import time
from pathlib import Path


def own_time() -> float:
    """Return seconds of the monotonic clock, without the time in which this thread waited for a core.

    Source: Linux, Documentation/scheduler/sched-stats.rst (``/proc/PID/schedstat``).
    """
    _, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return time.monotonic() - int(waited_ns) / 1e9
