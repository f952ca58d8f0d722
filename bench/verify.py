"""Measures how long one look of ``skep verify`` takes a manager, and for how long it holds the event loop.

::

    .venv/bin/python -m bench.verify                            # the table, kept in results/
    .venv/bin/python -m bench.verify --nodes 500 --tasks 10000

It uses the state of ``bench.what_if``, which violates nothing.  Without violations, a check has a single look.
"""

from bench.what_if import HELD_MS, measure
from skep.aio.clock import SystemClock
from skep.manager.verify.loop import InvariantCheck
from skep.store.state import State


async def check(state: State) -> int:
    """Check the state once, and return the number of violations."""
    return len(await InvariantCheck(lambda: state, SystemClock()).run())


if __name__ == "__main__":
    measure(
        check,
        description=__doc__,
        kind="verify",
        title="skep verify",
        counted="violations",
        limits="One look at a state without violations. Limit at 5,000 nodes: the loop is held "
        f"{HELD_MS:g} ms.",
    )
