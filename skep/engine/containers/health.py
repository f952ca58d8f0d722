"""Runs the health checks of containers.  Has the rules, as pure functions, and the loop that probes.

A container starts as *starting*.  The first successful probe makes it healthy, and ``retries`` consecutive failures
make it unhealthy.  Until it is first healthy, failures within its start period do not count, and it is probed more
often (``start_interval``).

Source: moby, daemon/health.go.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.failures import describe_error, log_error
from skep.aio.race import LostRace, run_unless
from skep.engine.containers.container import (
    Container,
    ContainerState,
    Health,
    HealthStatus,
    Probe,
)
from skep.engine.containers.execs import KILLED_S, Execs
from skep.engine.containers.limited_execs import LimitedExecs
from skep.engine.containers.state import ContainerStore
from skep.engine.lifecycle.life_events import Probed
from skep.engine.runtime.processes import is_alive
from skep.errors import NotFound, SkepError
from skep.model.container import HealthConfig
from skep.model.values.ids import ContainerId
from skep.model.values.times import SECOND_NS, timestamp, unix_ns

_INTERVAL_NS = 30 * SECOND_NS
"""Docker's defaults for the durations of a health check, in nanoseconds.  Source: moby, daemon/health.go."""
_START_INTERVAL_NS = 5 * SECOND_NS
"""Docker's default interval during the start period."""
_TIMEOUT_NS = 30 * SECOND_NS
"""Docker's default time for one probe."""
_RETRIES = 3
"""Docker's default number of consecutive failures that make a container unhealthy."""
LOG_MAX = 5
"""Number of last probes that the state keeps."""
ENDED_S = 5.0
"""Seconds to wait for the recorded end of a container whose first process has ended."""
SUCCESS = 0
"""Exit code of a successful probe.  All others count as failures, as in Docker."""
BROKEN = -1
"""Exit code of a probe that could not run or took too long."""


def merged(
    own: HealthConfig | None, image: HealthConfig | None, *, image_interval_ns_min: int = 0
) -> HealthConfig | None:
    """Merge a container's ``own`` health check with the image's health check, which fills fields that are not set.

    Args:
            image_interval_ns_min: Shortest interval that an image may choose.  Shorter intervals are raised to it.

    Source: moby, daemon/commit.go (merge).
    """
    if image is not None:
        image = replace(
            image,
            interval=image.interval and max(image.interval, image_interval_ns_min),
            start_interval=image.start_interval and max(image.start_interval, image_interval_ns_min),
        )
    if own is None or image is None:
        return own or image
    return HealthConfig(
        test=own.test or image.test,
        interval=own.interval or image.interval,
        timeout=own.timeout or image.timeout,
        start_period=own.start_period or image.start_period,
        start_interval=own.start_interval or image.start_interval,
        retries=own.retries or image.retries,
    )


def command(config: HealthConfig | None, shell: Sequence[str] = ("/bin/sh", "-c")) -> tuple[str, ...]:
    """Return the command of a health check.  Empty without a check, or if its form is unknown."""
    match config.test if config is not None else ():
        case ("CMD", *words):
            return tuple(words)
        case ("CMD-SHELL", *words):
            return (*shell, *words)
        case _:
            return ()


def initial(config: HealthConfig | None) -> Health | None:
    """Return the initial state of a starting container, or None without a health check."""
    return Health() if command(config) else None


def interval_s(config: HealthConfig, health: Health, running_s: float) -> float:
    """Return the seconds until the next probe of a container that has been running for ``running_s``."""
    is_early = running_s < config.start_period / SECOND_NS
    if is_early and health.status is HealthStatus.STARTING:
        return (config.start_interval or _START_INTERVAL_NS) / SECOND_NS
    return (config.interval or _INTERVAL_NS) / SECOND_NS


def timeout_s(config: HealthConfig) -> float:
    """Return the timeout of a probe in seconds."""
    return (config.timeout or _TIMEOUT_NS) / SECOND_NS


def after_probe(config: HealthConfig, health: Health, probe: Probe, began_s: float) -> Health:
    """Return the health after ``probe``.

    ``began_s`` is how long the container had been running when the probe began.
    """
    log = (*health.log, probe)[-LOG_MAX:]
    if probe.exit_code == SUCCESS:
        return Health(status=HealthStatus.HEALTHY, log=log)
    if health.status is HealthStatus.STARTING and began_s < config.start_period / SECOND_NS:
        return Health(status=health.status, failing_streak=health.failing_streak, log=log)
    streak = health.failing_streak + 1
    status = HealthStatus.UNHEALTHY if streak >= retries(config) else health.status
    return Health(status=status, failing_streak=streak, log=log)


def is_failing(config: HealthConfig | None, health: Health) -> bool:
    """Return whether failed probes have made a container unhealthy.

    The status does not tell that, because a stopped container is always shown as unhealthy.
    """
    return config is not None and health.failing_streak >= retries(config)


def retries(config: HealthConfig) -> int:
    """Return the number of consecutive failures that make a container unhealthy."""
    return config.retries if config.retries > 0 else _RETRIES


class HealthMonitor:
    """Probes running containers and keeps their health in their records.

    A probe is an exec with a time limit (``limited_execs``).
    """

    def __init__(
        self,
        store: ContainerStore,
        execs: Execs,
        clock: Clock,
        *,
        report: Callable[[ContainerId, Probed], Awaitable[object]],
        ended_s: float = ENDED_S,
        killed_s: float = KILLED_S,
    ) -> None:
        """``report`` applies the result of a probe to the record.  See ``ENDED_S`` and ``KILLED_S``."""
        self._store = store
        self._clock = clock
        self._report = report
        self._ended_s = ended_s
        self._limited = LimitedExecs(execs, "health check", killed_s)
        self.count = self.failures = 0
        """Numbers of probes and of failed probes."""

    async def run(self, id: ContainerId) -> None:
        """Probe a running container until it ends."""
        with suppress(LostRace, NotFound):
            await run_unless(self._probe_on(id), self._wait_ended(id))
        self._limited.forget(id)

    async def wait(self, id: ContainerId, *wanted: HealthStatus) -> Container:
        """Wait until the health is one of ``wanted`` or the container does not run.

        Returns at once without a health check.

        Raises: NotFound: the container was removed.
        """
        while True:
            container = self._store.get(id)
            health = container.health
            if health is None or health.status in wanted or not container.is_running:
                return container
            await self._store.wait_changed(id)

    async def _wait_ended(self, id: ContainerId) -> None:
        while (container := self._store.lookup(id)) is not None and container.is_running:
            await self._store.wait_changed(id)

    async def _wait_paused(self, id: ContainerId) -> None:
        """Wait until the container is paused or removed."""
        while (container := self._store.lookup(id)) is not None:
            if container.state is ContainerState.PAUSED:
                return
            await self._store.wait_changed(id)

    async def _probe_on(self, id: ContainerId) -> None:
        container = self._store.get(id)
        config = container.config.healthcheck
        assert config is not None, "only containers with a health check are probed"
        # The start is a wall-clock time, because an earlier process may have started the container.  From here on,
        # the monotonic clock measures.
        before_s = max(0.0, (self._clock.now_ns() - unix_ns(container.started_at)) / SECOND_NS)
        since = self._clock.monotonic() - before_s
        while (before := self._store.get(id).health) is not None:
            await self._clock.sleep(interval_s(config, before, self._clock.monotonic() - since))
            container = self._store.get(id)
            if container.state is ContainerState.PAUSED:
                continue
            began_s = self._clock.monotonic() - since
            async with asyncio.TaskGroup() as group:
                pausing = group.create_task(self._wait_paused(id))
                probe = await self._probe(container, config)
                self.count += 1
                self.failures += probe.exit_code != SUCCESS
                was_paused = pausing.done()
                pausing.cancel()
            if was_paused:
                continue  # a probe that was frozen says nothing about the container
            if probe.exit_code != SUCCESS and _has_ended(self._store.get(id)):
                with suppress(TimeoutError):  # if a thread or conmon hangs, this counts as a failure
                    async with asyncio.timeout(self._ended_s):
                        await self._wait_ended(id)
            if not self._store.get(id).is_running:
                return  # the container has ended meanwhile, so the result means nothing
            health = after_probe(config, before, probe, began_s)
            await self._report(id, Probed(container.process, health))

    async def _probe(self, container: Container, config: HealthConfig) -> Probe:
        start = timestamp(self._clock.now_ns())
        output = bytearray()
        try:
            exit_code = await self._limited.run(container.id, command(config), timeout_s(config), output)
        except TimeoutError:
            exit_code = BROKEN
            shown = f": {_text(output)}" if output else ""
            output = bytearray(f"Health check exceeded timeout ({timeout_s(config):g}s){shown}".encode())
        except Exception as error:  # whatever error the container causes
            if not isinstance(error, SkepError | OSError):
                log_error(error, "probe failed", container=container.id)
            exit_code, output = BROKEN, bytearray(describe_error(error).encode(errors="replace"))
        return Probe(
            start=start, end=timestamp(self._clock.now_ns()), exit_code=exit_code, output=_text(output)
        )


def _has_ended(container: Container) -> bool:
    """Return whether the first process has ended, even if its end is not recorded yet.  Then no probe can run."""
    try:
        return container.process is not None and not is_alive(container.process)
    except OSError:  # out of descriptors
        return False


def _text(output: bytearray) -> str:
    return output.decode(errors="replace")
