"""A manager that waits for a quorum when it starts.

It says so: the node process, which is asked meanwhile, looks.  And it looks for the others, and is found by them: they
may have come back under other addresses than it knows.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.manager.membership.whereabouts import Whereabouts

log = structlog.get_logger(__name__)

USUAL_S = 1.0
"""A start among others that are there takes less."""


async def wait_for_others(
    mark: Path,
    whereabouts: Whereabouts,
    listening: AbstractAsyncContextManager[object],
    clock: Clock,
    trouble: Callable[[], str],
) -> None:
    """Until cancelled, once a start has taken longer than usual: have ``mark`` exist, listen, and look around.

    ``trouble``: what keeps this manager itself from starting, in a sentence; it is written into the mark.
    """
    mark.unlink(missing_ok=True)
    await clock.sleep(USUAL_S)
    log.warning("no quorum yet: looking for the other managers")
    mark.write_text(trouble())
    try:
        async with listening:
            await whereabouts.search()
    finally:
        mark.unlink(missing_ok=True)
