"""``make sim``: ``python -m sim 123`` simulates one seed and prints its events, ``--seeds 10000`` simulates many."""

import argparse
import sys
from pathlib import Path

from sim import run, what_if
from sim.containers import run as containers
from sim.record import Record, code_of
from sim.seeds import Simulate, chunked, failures, report, results
from sim.store_only import run as store_only
from skep.aio.clock import SystemClock

TRACE_LINES = 400
RECORDED = 100
"""Number of seeds in one line of a record."""


def main() -> int:
    """Simulate the requested seeds.  Return 1 if a run had violations."""
    parser = argparse.ArgumentParser(prog="python -m sim", description="Simulated clusters.")
    parser.add_argument("seed", type=int, nargs="?", help="simulate this seed only, and print its events")
    parser.add_argument("--seeds", type=int, default=200, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=0, help="default: one per processor")
    parser.add_argument("--store", action="store_true", help="simulate the store only, which is cheaper")
    parser.add_argument(
        "--containers", action="store_true", help="simulate the containers of one node, which is cheaper"
    )
    parser.add_argument(
        "--what-if", action="store_true", help="compare the answers of skep what-if with what happens"
    )
    parser.add_argument(
        "--record", type=Path, help="append the result to this file, and continue after its last seed"
    )
    args = parser.parse_args()
    simulate: Simulate = run.simulate
    if args.store or args.containers:
        simulate = store_only.simulate if args.store else containers.simulate
    elif args.what_if:
        simulate = what_if.simulate
    if args.seed is not None:
        return _run_one(args.seed, simulate)
    if args.record is not None:
        return _run_recorded(args, simulate)
    clock = SystemClock()
    began, failed = clock.monotonic(), 0
    for result in failures(range(args.first, args.first + args.seeds), args.processes, simulate):
        failed += 1
        _print(report(result))
    took_s = clock.monotonic() - began
    _print(f"{args.seeds} runs, {failed} failed, {took_s:.0f} s, {args.seeds / took_s:.1f} per second")
    return 1 if failed else 0


def _run_recorded(args: argparse.Namespace, simulate: Simulate) -> int:
    """Simulate the seeds that the record lacks, and append each part to the record as soon as it is done."""
    record, clock = Record(args.record, _kind(args), code_of(sys.modules.values())), SystemClock()
    first = max(args.first, record.next_seed())
    for seeds in chunked(range(first, args.first + args.seeds), RECORDED):
        began, failed = clock.monotonic(), []
        for result in failures(seeds, args.processes, simulate):
            failed.append(result.seed)
            _print(report(result))
        record.add(seeds, failed, clock.monotonic() - began)
    _print(record.summary())
    return 1 if record.failed() else 0


def _kind(args: argparse.Namespace) -> str:
    """Return the name of the simulation that the runs of a record belong to."""
    kinds = {"containers": args.containers, "store": args.store, "what-if": args.what_if}
    return next((name for name, is_asked in kinds.items() if is_asked), "whole")


def _run_one(seed: int, simulate: Simulate) -> int:
    (result,) = results([seed], simulate)
    if result.violations:
        _print(report(result, TRACE_LINES))
        return 1
    _print("\n".join(result.trace))
    _print(f"seed {seed}: no violations")
    return 0


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
