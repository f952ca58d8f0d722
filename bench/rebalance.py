"""Measures how long a plan of ``skep rebalance`` takes a manager, and for how long it holds the event loop.

::

    .venv/bin/python -m bench.rebalance                            # the table, kept in results/
    .venv/bin/python -m bench.rebalance --nodes 500 --tasks 10000

It uses the state of ``bench.what_if`` after the return of a third of the nodes, which have no tasks.
"""

import asyncio

from bench.what_if import HELD_MS, measure
from skep.aio.clock import SystemClock
from skep.aio.time_slices import result_in_slices
from skep.manager.rebalance.plan import MOVES_MAX, Balance, loads_of
from skep.store.state import State


async def plan(state: State) -> int:
    """Make a plan, and return the number of its moves."""
    balance = Balance(state, loads_of(state), 0)
    await asyncio.sleep(0)
    return len(await result_in_slices(balance.planning(), SystemClock()))


if __name__ == "__main__":
    measure(
        plan,
        description=__doc__,
        kind="rebalance",
        title="skep rebalance",
        counted="moves",
        limits=f"One plan, of at most {MOVES_MAX} moves. Limit at 5,000 nodes: the loop is held {HELD_MS:g} ms.",
        returned=1 / 3,
    )
