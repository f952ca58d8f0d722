"""Keeps logs with a bound small: a new file when the present one has reached its size."""

from collections.abc import Callable, Iterable

import structlog

from skep.aio.clock import Clock
from skep.aio.guard import report
from skep.engine import logs
from skep.engine.bundle import Bundles
from skep.engine.container import Container
from skep.engine.runtime import Runtime

log = structlog.get_logger()

CHECK_S = 1.0
"""How often sizes are looked at; a log may grow past its bound for so long."""


class LogKeeper:
    """Rotates the logs of running containers."""

    def __init__(
        self, bundles: Bundles, runtime: Runtime, clock: Clock, containers: Callable[[], Iterable[Container]]
    ) -> None:
        self._bundles = bundles
        self._runtime = runtime
        self._clock = clock
        self._containers = containers

    async def run(self) -> None:
        """Look at all of them again and again until cancelled."""
        while True:
            await self._clock.sleep(CHECK_S)
            for container in self._containers():
                if container.is_running and container.config.log.max_size_bytes:
                    self.rotate(container)

    def rotate(self, container: Container) -> None:
        """Begin a new file, if the present one has reached its size."""
        current = self._bundles.log(container.id)
        try:
            logs.rotate(current, container.config.log, lambda: self._runtime.reopen_log(container.id))
        except Exception as error:  # it is one log
            report(error, "log not rotated", container=container.id)
