"""Runs the parts of a node."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.aio.groups import first_alone
from skep.aio.race import LostRace, run_unless
from skep.errors import SkepError
from skep.node.supervision.zygote import ZygoteGone

log = structlog.get_logger()

Work = Callable[[], Coroutine[Any, Any, None]]


def run_part(group: asyncio.TaskGroup, clock: Clock, work: Work, name: str) -> None:
    """Run a part of the node in ``group``, and restart it after every failure, with growing pauses."""

    async def run() -> None:
        with first_alone(SkepError):
            await work()

    # only a new node process has a new zygote
    repeated = retry(run, "part of the node failed", clock=clock, passes=(ZygoteGone,), part=name)
    group.create_task(repeated, name=name)


async def wait_briefly(ready: Coroutine[Any, Any, None], seconds: float, clock: Clock) -> None:
    """Wait until ``ready`` has returned, but at most ``seconds``."""
    try:
        await run_unless(ready, clock.sleep(seconds))
    except LostRace:
        log.warning("some containers not found yet", after_s=seconds)


async def run_after(ready: Work, work: Work) -> None:
    """Run ``work`` once ``ready`` has returned."""
    await ready()
    await work()
