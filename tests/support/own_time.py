"""A clock for tests of how long something takes, on machines that have other things to do."""

import time
from pathlib import Path


def own_time() -> float:
    """Seconds of the monotonic clock, without those that this thread stood in line for a core.

    Source: Linux, Documentation/scheduler/sched-stats.rst (``/proc/PID/schedstat``).
    """
    _, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return time.monotonic() - int(waited_ns) / 1e9
