"""Probes running containers and keeps their health; the rules are in ``health``.

A probe is an exec with a deadline.  One that is too slow is killed before the next begins, so probes never pile up.

Source: moby, daemon/health.go.
"""

import asyncio
import os
import signal
from contextlib import suppress

import structlog

from skep.aio.clock import Clock
from skep.aio.failures import describe_error, log_error
from skep.aio.race import Preempted, run_unless
from skep.engine import health
from skep.engine.attachment import Attachment
from skep.engine.cgroups import Cgroups
from skep.engine.container import Container, ContainerState, ExecConfig
from skep.engine.events import Events
from skep.engine.execs import Execs
from skep.engine.health import HealthStatus, Probe
from skep.engine.state import ContainerStore
from skep.errors import NotFound, SkepError
from skep.model.container import HealthConfig
from skep.model.ids import ContainerId
from skep.model.times import SECOND_NS, timestamp, unix_ns

log = structlog.get_logger()

_KILLED_S = 10.0
"""How long a killed probe may take to end: its conmon has to see it."""


class HealthChecks:
    """The probes of this node's containers."""

    def __init__(
        self, store: ContainerStore, execs: Execs, events: Events, cgroups: Cgroups, clock: Clock
    ) -> None:
        self._store = store
        self._execs = execs
        self._events = events
        self._cgroups = cgroups
        self._clock = clock

    async def run(self, id: ContainerId) -> None:
        """Probe a running container until it ends."""
        with suppress(Preempted, NotFound):
            await run_unless(self._probe_on(id), self._wait_ended(id))
        container = self._store.lookup(id)
        if container is not None and container.health is not None:
            self._store.observe(id, health=health.stopped(container.health))

    async def wait(self, id: ContainerId, *wanted: HealthStatus) -> Container:
        """Return when its health is one of ``wanted``, when it does not run, or at once if it has no probe.

        Raises: NotFound: it is gone.
        """
        while True:
            container = self._store.get(id)
            known = container.health
            if known is None or known.status in wanted or not container.is_running:
                return container
            await self._store.wait_changed(id)

    async def _wait_ended(self, id: ContainerId) -> None:
        while (container := self._store.lookup(id)) is not None and container.is_running:
            await self._store.wait_changed(id)

    async def _probe_on(self, id: ContainerId) -> None:
        container = self._store.get(id)
        config = container.config.healthcheck
        assert config is not None, "only containers with a probe are probed"
        # Measured by one clock from here on: an earlier process may have started it.
        before_s = max(0.0, (self._clock.now_ns() - unix_ns(container.started_at)) / SECOND_NS)
        since = self._clock.monotonic() - before_s
        while (known := self._store.get(id).health) is not None:
            await self._clock.sleep(health.pause_s(config, known, self._clock.monotonic() - since))
            container = self._store.get(id)
            if container.state is ContainerState.PAUSED:
                continue
            began_s = self._clock.monotonic() - since
            probe = await self._probe(container, config)
            if not self._store.get(id).is_running:
                return  # it ended meanwhile: the result means nothing
            new = health.after(config, known, probe, began_s)
            container = self._store.observe(id, health=new)
            if new.status is not known.status:
                self._events.publish(f"health_status: {new.status.value}", container)

    async def _probe(self, container: Container, config: HealthConfig) -> Probe:
        start = timestamp(self._clock.now_ns())
        output = bytearray()
        try:
            exit_code = await self._execute(container, config, output)
        except TimeoutError:
            exit_code = health.BROKEN
            shown = f": {_text(output)}" if output else ""
            output = bytearray(
                f"Health check exceeded timeout ({health.timeout_s(config):g}s){shown}".encode()
            )
        except Exception as error:  # whatever the container had it meet
            if not isinstance(error, SkepError | OSError):
                log_error(error, "probe failed", container=container.id)
            exit_code, output = health.BROKEN, bytearray(describe_error(error).encode(errors="replace"))
        return Probe(
            start=start, end=timestamp(self._clock.now_ns()), exit_code=exit_code, output=_text(output)
        )

    async def _execute(self, container: Container, config: HealthConfig, output: bytearray) -> int:
        """Run the probe; its exit code.  Raises: TimeoutError; SkepError, OSError: it could not be run."""
        exec_id = self._execs.create(container.id, ExecConfig(command=health.command(config)))
        try:
            async with asyncio.timeout(health.timeout_s(config)):
                attachment = await self._execs.start(exec_id)
                try:
                    await _collect(attachment, output)
                finally:
                    attachment.close()
                return (await self._execs.wait(exec_id)).exit_code or 0
        finally:
            await self._end(container, exec_id)
            self._execs.drop(exec_id)

    async def _end(self, container: Container, exec_id: str) -> None:
        """Kill a probe that still runs and return when it is gone."""
        try:
            exec = self._execs.get(exec_id)
        except NotFound:  # it went with its container; raised here it would hide that the probe is cancelled
            return
        if not exec.running or not exec.pid:
            return
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(exec.pid)
            try:
                # Checked once the descriptor is open: what is in the container's cgroup then is the container's.
                if exec.pid in self._cgroups.pids(container.id):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)
        with suppress(TimeoutError, NotFound):
            async with asyncio.timeout(_KILLED_S):
                await self._execs.wait(exec_id)


async def _collect(attachment: Attachment, output: bytearray) -> None:
    """Read to the end; ``output`` gets as much of it as is kept."""
    while (piece := await attachment.read()) is not None:
        output += piece[1][: health.OUTPUT_BYTES_MAX - len(output)]


def _text(output: bytearray) -> str:
    return output.decode(errors="replace")
