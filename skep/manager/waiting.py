"""A manager that waits for a quorum when it starts says so: the node process, which is asked meanwhile, looks."""

import asyncio
from pathlib import Path

import structlog

from skep.aio.clock import Clock

log = structlog.get_logger(__name__)

USUAL_S = 2.0
"""A start among others that are there takes less."""


async def say_waiting(mark: Path, clock: Clock) -> None:
    """Have ``mark`` exist while this runs, once it has run for longer than a start usually takes."""
    mark.unlink(missing_ok=True)
    await clock.sleep(USUAL_S)
    log.warning("no quorum yet: waiting for the other managers")
    mark.touch()
    try:
        await asyncio.Event().wait()
    finally:
        mark.unlink(missing_ok=True)
