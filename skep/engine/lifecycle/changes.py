"""Functions by which rules of ``machine.TABLE`` change the record.  docs/design/runtime.md shows their docstrings.
Pure.
"""

from typing import Any

from msgspec.structs import replace

from skep.engine.containers.container import Container, ContainerState, HealthStatus, PlainOptions
from skep.engine.lifecycle import network_rules
from skep.engine.lifecycle.life_events import (
    Adopted,
    Attached,
    BundleWritten,
    Connect,
    Disconnect,
    EffectFailed,
    Exited,
    LifeEvent,
    NetworksChanged,
    Probed,
    ProcessCreated,
    Rename,
    Start,
    Started,
    Updated,
)
from skep.model.values.times import ZERO_TIME


def wanted(container: Container, _: LifeEvent) -> Container:
    """not stopped, no restarts, policy inactive until its exit"""
    return _with_plain(replace(container, is_at_rest=True), is_stopped=False, restarts=0)


def stopped(container: Container, _: LifeEvent) -> Container:
    """stopped by the user"""
    if container.plain is None or container.plain.is_stopped:
        return container
    return _with_plain(container, is_stopped=True)


def resumed(container: Container, event: Start) -> Container:
    """not stopped, if by policy"""
    if not event.by_policy or container.plain is None or not container.plain.is_stopped:
        return container
    return _with_plain(container, is_stopped=False)


def counted(container: Container, _: LifeEvent) -> Container:
    """one more restart"""
    plain = container.plain or PlainOptions()
    return _with_plain(replace(container, is_at_rest=False), restarts=plain.restarts + 1)


def with_sandbox(container: Container, event: Attached) -> Container:
    """sandbox"""
    return replace(container, sandbox=event.sandbox)


def with_warnings(container: Container, event: BundleWritten) -> Container:
    """warnings"""
    return container if event.warnings == container.warnings else replace(container, warnings=event.warnings)


def with_process(container: Container, event: ProcessCreated) -> Container:
    """process and monitor"""
    return replace(container, process=event.process, monitor=event.monitor)


def began(container: Container, event: Started | Adopted) -> Container:
    """start time, no exit code, initial health"""
    return replace(
        container,
        started_at=event.at,
        finished_at=ZERO_TIME,
        exit_code=0,
        error="",
        interruption=None,
        oom_killed=False,
        health=event.health,
    )


def ended(container: Container, event: Exited) -> Container:
    """exit code, end time, no process, unhealthy, policy active"""
    health = container.health  # unhealthy without a process, as in Docker
    return replace(
        container,
        process=None,
        monitor=None,
        exit_code=event.exit_code,
        oom_killed=event.oom_killed,
        error=event.error,
        interruption=event.interruption,
        health=None if health is None else replace(health, status=HealthStatus.UNHEALTHY),
        finished_at=event.at,
        is_at_rest=False,
    )


def undone(container: Container, event: EffectFailed) -> Container:
    """error and exit code, no process, no sandbox"""
    failed = replace(container, exit_code=event.exit_code, error=event.reason)
    return replace(failed, process=None, monitor=None, sandbox=None)


def retired(container: Container, _: LifeEvent) -> Container:
    """retired, no process, no sandbox"""
    return replace(container, process=None, monitor=None, sandbox=None, is_retired=True)


def without_process(container: Container, _: LifeEvent) -> Container:
    """no process"""
    return replace(container, process=None, monitor=None)


def cleaned(container: Container, _: LifeEvent) -> Container:
    """no process, no sandbox, policy active"""
    return replace(container, process=None, monitor=None, sandbox=None, is_at_rest=False)


def active(container: Container, _: LifeEvent) -> Container:
    """policy active"""
    return replace(container, is_at_rest=False) if container.is_at_rest else container


def with_error(container: Container, event: EffectFailed) -> Container:
    """error"""
    return replace(container, error=event.reason)


def with_health(container: Container, event: Probed) -> Container:
    """health"""
    return replace(container, health=event.health)


def updated(container: Container, event: Updated) -> Container:
    """limits, restart policy, warnings"""
    # A policy that is set while the container is stopped applies from its next exit on.
    has_ended = container.state is ContainerState.EXITED and not container.is_restarting
    changed = replace(
        container,
        config=event.config,
        warnings=tuple(dict.fromkeys((*container.warnings, *event.warnings))),
        is_at_rest=container.is_at_rest or has_ended,
    )
    return changed if event.restart is None else _with_plain(changed, restart=event.restart)


def with_next_networks(container: Container, event: Connect | Disconnect) -> Container:
    """networks of the next run"""
    return replace(container, plain=network_rules.options_after(container, event))


def with_networks(container: Container, event: NetworksChanged) -> Container:
    """sandbox, networks of the next run"""
    changed = replace(container, sandbox=event.sandbox)
    return _with_plain(changed, mode=event.mode, networks=event.networks, mac_address=event.mac_address)


def renamed(container: Container, event: Rename) -> Container:
    """new name"""
    return replace(container, name=event.name)


def renamed_back(container: Container, event: EffectFailed) -> Container:
    """old name"""
    return replace(container, name=event.old_name)


def _with_plain(container: Container, **changed: Any) -> Container:
    if container.plain is None:
        return container
    return replace(container, plain=replace(container.plain, **changed))
