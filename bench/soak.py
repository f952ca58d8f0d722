"""Hours of load and faults, with constant checks of the invariants.

Each round makes a request (create, scale, update, remove) and sometimes injects a fault: a machine loses power or its
cable or hangs, or a daemon is killed.  After each round the cluster has to reach the desired state within its
deadline.  It has exactly the requested running tasks and containers.  Every service responds to every member of its
networks, plain and encrypted, and at its published port on every node.  No two containers have the same address, no
namespace is left over, and no drop counter rises (``soak_networks.py``).  The daemons' memory is recorded every ten
minutes.  At the end, its growth must be within the limit.

    .venv/bin/python -m bench.soak --minutes 60
    .venv/bin/python -m bench.soak --alone --minutes 120 --seed 7 --faults 0    # one node
"""

import argparse
import os
import random
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from bench import soak_alone, soak_cluster
from bench.run import RESULTS, commit
from bench.soak_users import Log


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.soak", description="Load and faults, with invariants checked."
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--dir", default="/var/tmp", help="where nodes keep their state; not on overlayfs")
    parser.add_argument("--faults", type=float, default=0.3, help="share of rounds with one (default 0.3)")
    parser.add_argument(
        "--alone", action="store_true", help="one node instead of three managers and three workers"
    )
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "big")
    RESULTS.mkdir(exist_ok=True)
    kind = "-alone" if options.alone else ""
    log = Log(RESULTS / f"soak{kind}-{datetime.now(UTC):%Y-%m-%d-%H%M}-{commit()}.log")
    what = soak_alone.soak if options.alone else soak_cluster.soak
    log(
        f"soak of {options.minutes:g} minutes, commit {commit()}, seed {seed}, "
        f"faults in {options.faults:.0%} of the rounds"
    )
    with tempfile.TemporaryDirectory(prefix="skep-soak-", dir=options.dir) as directory:
        what(Path(directory) / "skep", options.minutes, random.Random(seed), options.faults, log)


if __name__ == "__main__":
    main()
