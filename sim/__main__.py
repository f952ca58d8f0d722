"""``make sim``: see ``run``."""

import argparse
import sys

from sim import life
from sim.alone import life as alone
from sim.run import Live, failures, outcomes, report
from skep.aio.clock import SystemClock

TRACE_LINES = 400


def main() -> int:
    """Gives 1 if any life went wrong."""
    parser = argparse.ArgumentParser(prog="python -m sim", description="Lives of simulated clusters.")
    parser.add_argument("seed", type=int, nargs="?", help="live this seed alone and tell everything")
    parser.add_argument("--seeds", type=int, default=200, help="how many to live")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--processes", type=int, default=0, help="default: one per processor")
    parser.add_argument("--store", action="store_true", help="lives of the store alone, which are cheaper")
    wish = parser.parse_args()
    live: Live = alone.live if wish.store else life.live
    if wish.seed is not None:
        return _tell(wish.seed, live)
    clock = SystemClock()
    began, failed = clock.monotonic(), 0
    for outcome in failures(range(wish.first, wish.first + wish.seeds), wish.processes, live):
        failed += 1
        _say(report(outcome))
    took_s = clock.monotonic() - began
    _say(f"{wish.seeds} lives, {failed} failed, {took_s:.0f} s, {wish.seeds / took_s:.1f} a second")
    return 1 if failed else 0


def _tell(seed: int, live: Live) -> int:
    (outcome,) = outcomes([seed], live)
    if outcome.violations:
        _say(report(outcome, TRACE_LINES))
        return 1
    _say("\n".join(outcome.trace))
    _say(f"seed {seed}: nothing went wrong")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
