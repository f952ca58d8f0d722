"""The parts of the node process: each runs for as long as the process does, and is begun again when it fails."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from skep.aio.clock import Clock
from skep.aio.first import Overtaken, unless
from skep.aio.groups import first_alone
from skep.aio.guard import persist
from skep.errors import SkepError
from skep.node.supervision.zygote import ZygoteGone

log = structlog.get_logger()


def keep_running(
    group: asyncio.TaskGroup, clock: Clock, work: Callable[[], Coroutine[Any, Any, None]], name: str
) -> None:
    """Have a part of the node run until the group is cancelled, again after whatever it fails of."""

    async def run() -> None:
        with first_alone(SkepError):
            await work()

    # Only another node process has another zygote.
    kept = persist(run, "part of the node failed", clock=clock, passes=(ZygoteGone,), part=name)
    group.create_task(kept, name=name)


async def within(ready: Coroutine[Any, Any, None], seconds: float, clock: Clock) -> None:
    """Wait until the containers of earlier processes are known, so that no listing misses one."""
    try:
        await unless(ready, clock.sleep(seconds))
    except Overtaken:
        log.warning("not all containers are found again yet", after_s=seconds)


async def after(
    ready: Callable[[], Coroutine[Any, Any, None]], work: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """``work``, once ``ready``."""
    await ready()
    await work()
