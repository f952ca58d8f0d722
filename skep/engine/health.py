"""Whether a container works, by the probe its image or its service names.  Pure.

A container begins *starting*.  The first probe that succeeds makes it healthy; as many failures in a row as
``retries`` make it unhealthy.  While it has never been healthy, failures within its start period do not count, and it
is probed more often (``start_interval``).

Source: moby, daemon/health.go.
"""

from collections.abc import Sequence
from enum import Enum

import msgspec

from skep.model.container import HealthConfig
from skep.model.times import SECOND_NS, Timestamp

_INTERVAL_NS = 30 * SECOND_NS
_START_INTERVAL_NS = 5 * SECOND_NS
_TIMEOUT_NS = 30 * SECOND_NS
_RETRIES = 3
LOG_MAX = 5
OUTPUT_BYTES_MAX = 4096
SUCCESS = 0
BROKEN = -1
"""Exit code of a probe that could not be run, or took too long."""


class HealthStatus(Enum):
    """Docker's words (``State.Health.Status``)."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Probe(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """One probe and what came of it, as ``docker inspect`` shows it."""

    start: Timestamp
    end: Timestamp
    exit_code: int
    output: str


class Health(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """Where a container with a probe stands, as ``docker inspect`` shows it.  ``log``: the last probes."""

    status: HealthStatus = HealthStatus.STARTING
    failing_streak: int = 0
    log: tuple[Probe, ...] = ()


def merged(own: HealthConfig | None, image: HealthConfig | None) -> HealthConfig | None:
    """The probe of a service over the image's: what the service leaves open is the image's.

    Source: moby, daemon/commit.go (merge).
    """
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
    """The command of a probe; empty: there is none, or its form is not known."""
    match config.test if config is not None else ():
        case ("CMD", *words):
            return tuple(words)
        case ("CMD-SHELL", *words):
            return (*shell, *words)
        case _:
            return ()


def first(config: HealthConfig | None) -> Health | None:
    """Where a container stands when it starts; None: it has no probe."""
    return Health() if command(config) else None


def pause_s(config: HealthConfig, health: Health, running_s: float) -> float:
    """Seconds until the next probe of a container that has been running for ``running_s``."""
    is_early = running_s < config.start_period / SECOND_NS
    if is_early and health.status is HealthStatus.STARTING:
        return (config.start_interval or _START_INTERVAL_NS) / SECOND_NS
    return (config.interval or _INTERVAL_NS) / SECOND_NS


def timeout_s(config: HealthConfig) -> float:
    """Seconds that a probe may take."""
    return (config.timeout or _TIMEOUT_NS) / SECOND_NS


def after(config: HealthConfig, health: Health, probe: Probe, began_s: float) -> Health:
    """Where the container stands after ``probe``, which began when it had been running for ``began_s``."""
    log = (*health.log, probe)[-LOG_MAX:]
    if probe.exit_code == SUCCESS:
        return Health(status=HealthStatus.HEALTHY, log=log)
    if health.status is HealthStatus.STARTING and began_s < config.start_period / SECOND_NS:
        return Health(status=health.status, failing_streak=health.failing_streak, log=log)
    streak = health.failing_streak + 1
    is_enough = streak >= (config.retries if config.retries > 0 else _RETRIES)
    status = HealthStatus.UNHEALTHY if is_enough else health.status
    return Health(status=status, failing_streak=streak, log=log)


def stopped(health: Health) -> Health:
    """That of a container which does not run any more: unhealthy, as in the engine."""
    return msgspec.structs.replace(health, status=HealthStatus.UNHEALTHY)
