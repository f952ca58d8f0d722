"""Time of ``make demo`` on a machine that has the packages, until it has printed its address: 20 s at most.

python -m bench.demo --pairs 3
"""

import subprocess
import tempfile
import time
from pathlib import Path

from bench.figures import Figure, run_alone
from bench.machine import noise

ROOT = Path(__file__).parents[1]
LIMIT_S = 20.0


def measure(times: int) -> list[Figure]:
    """Start and remove the demo as often as requested.  The first start is not counted: it compiles all modules."""
    took, busy = [], []
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory:
        names = (f"DEMO_DIR={directory}/demo", "DEMO_NAME=benchdemo")
        for _ in range(times + 1):
            busy.append(noise())
            began = time.monotonic()
            subprocess.run(["make", "demo", *names], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            took.append(time.monotonic() - began)
            subprocess.run(["make", "demo-down", *names], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    what = "make demo until its address is printed"
    return [
        Figure(number=0, what=what, unit="s", values=tuple(took[1:]), limit=LIMIT_S, busy=tuple(busy[1:]))
    ]


if __name__ == "__main__":
    run_alone(__doc__ or "", "demo", measure)
