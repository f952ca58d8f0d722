"""Reason why a task's container ended, as observed by its node."""

import asyncio
import signal
from collections import deque

from msgspec.structs import replace

from skep.aio.failures import isolate
from skep.engine.containers.container import (
    Container,
    Health,
    HealthStatus,
    Interruption,
    LogFilter,
    StandardStream,
)
from skep.engine.containers.health import is_failing, retries
from skep.engine.containers.signals import signal_number
from skep.engine.engine import Engine
from skep.model.container import HealthConfig
from skep.model.task_end import (
    HEALTH_COMMAND_BYTES_MAX,
    SIGNALED,
    EndCause,
    KeptLine,
    TaskEnd,
    bounded_end,
    check_result,
    cut,
    on_one_line,
    signal_of,
)
from skep.model.values.ids import ContainerId
from skep.model.values.times import SECOND_NS, timestamp

LOG_SECONDS_MAX = 2.0
"""Seconds to read the last lines of an ended container.  After that, its end is reported without them."""

_INTERRUPTIONS = {
    Interruption.MACHINE_RESTARTED: EndCause.NODE_RESTARTED,
    Interruption.MONITOR_LOST: EndCause.MONITOR_LOST,
}


def end_of(container: Container, stopping_s: float | None) -> TaskEnd | None:
    """Return why ``container`` ended, without its last lines, or None if it was stopped and ended in time.

    ``stopping_s``: seconds since the node sent the stop signal because the task was retired, or None if it
    did not.
    """
    code = container.exit_code
    if container.interruption is not None:
        return TaskEnd(cause=_INTERRUPTIONS[container.interruption].value)
    if container.oom_killed:
        return TaskEnd(cause=EndCause.OUT_OF_MEMORY.value, signal=signal_of(code))
    if not container.was_started:
        return TaskEnd(cause=EndCause.START_FAILED.value) if container.error else None
    if stopping_s is not None:
        own = signal_number(container.config.stop_signal or "SIGTERM")
        grace = container.config.stop_grace_ns
        if code != SIGNALED + signal.SIGKILL or own == signal.SIGKILL or not grace:  # a requested kill
            return None
        if stopping_s < grace / SECOND_NS:  # somebody else killed it meanwhile
            return None
        return TaskEnd(cause=EndCause.STOP_TIMEOUT.value, signal=signal_of(code), grace=grace)
    if container.health is not None and is_failing(container.config.healthcheck, container.health):
        return unhealthy_end(container, container.health)
    name = signal_of(code)
    return TaskEnd(cause=(EndCause.SIGNAL if name else EndCause.EXIT).value, signal=name)


def unhealthy_end(container: Container, health: Health) -> TaskEnd:
    """Return the end of a container that was stopped as unhealthy.

    Names the failed check as the cause, not the signal that the node sent.
    """
    config = container.config.healthcheck
    # Checks continue during the stop, and the last ones can no longer run.  The check that made it unhealthy counts.
    later = max(health.failing_streak - retries(config), 0) if config is not None else 0
    failed = [probe for probe in health.log if probe.exit_code]
    last = failed[max(len(failed) - 1 - later, 0)] if failed else None
    return TaskEnd(
        cause=EndCause.UNHEALTHY.value,
        health_output=last.output if last is not None else "",
        # show the command as the user wrote it, without the shell that runs it
        health_command=" ".join(config.test[1:]) if config is not None else "",
        health_failures=min(health.failing_streak, retries(config)) if config is not None else 0,
        health_exit_code=last.exit_code if last is not None and last.exit_code > 0 else None,
    )


def failed_check(container: Container) -> str:
    """Return the last health check of a container that was not healthy yet, in words, or an empty text if it succeeded.

    Failures within the start period do not make a container unhealthy, so they would otherwise be known nowhere else.
    A container that is unhealthy runs until it has stopped, which may take its whole grace period.
    """
    config, health = container.config.healthcheck, container.health
    if config is None or health is None or not container.is_running:
        return ""
    if health.status is HealthStatus.UNHEALTHY:
        end = unhealthy_end(container, health)
        failed = _failed(config, end.health_exit_code or 0, end.health_output)
        return f"{EndCause.UNHEALTHY.value}: {failed}"
    if health.status is not HealthStatus.STARTING or not health.log or not health.log[-1].exit_code:
        return ""
    return _failed(config, health.log[-1].exit_code, health.log[-1].output)


def _failed(config: HealthConfig, exit_code: int, output: str) -> str:
    """Return the words for a failed health check.  ``exit_code``: not positive if the check did not end by itself."""
    shown = on_one_line(output)
    result = check_result(exit_code, shown) if exit_code > 0 else shown
    return f'its health check "{cut(" ".join(config.test[1:]), HEALTH_COMMAND_BYTES_MAX)}" failed: {result}'


async def with_last_lines(engine: Engine, id: ContainerId, end: TaskEnd, lines_max: int) -> TaskEnd:
    """Return ``end`` with the last ``lines_max`` lines of the container's log that can be read in time."""
    kept: deque[KeptLine] = deque(maxlen=max(lines_max, 0))
    if lines_max > 0:
        await isolate(_read_last_lines(engine, id, kept), "last lines not read", container=id)
    return bounded_end(replace(end, lines=tuple(kept)), lines_max)


async def _read_last_lines(engine: Engine, id: ContainerId, kept: deque[KeptLine]) -> None:
    async with asyncio.timeout(LOG_SECONDS_MAX):
        async for entry in engine.logs(id, LogFilter(tail=kept.maxlen)):
            kept.append(
                KeptLine(
                    timestamp=timestamp(entry.timestamp_ns),
                    stream="stderr" if entry.stream is StandardStream.STDERR else "stdout",
                    text=entry.data.decode(errors="replace").removesuffix("\n").removesuffix("\r"),
                )
            )
