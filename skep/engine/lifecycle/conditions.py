"""Conditions and refusals of the rules of ``machine.TABLE``.  docs/design/runtime.md shows the conditions' docstrings.
Pure.
"""

from skep.engine.containers.container import (
    BeingRemoved,
    Conflicting,
    Container,
    ContainerState,
    NotRunning,
    StillRunning,
)
from skep.engine.containers.signals import ends_pause
from skep.engine.lifecycle import network_rules
from skep.engine.lifecycle.life_events import (
    Adopted,
    Attempted,
    Connect,
    Disconnect,
    EffectFailed,
    Exec,
    Frozen,
    LifeEvent,
    Pause,
    Probed,
    RemoveContainer,
    Signal,
    Start,
    Thawed,
    Unpause,
    Update,
)
from skep.errors import SkepError


def is_task(container: Container, _: LifeEvent) -> bool:
    """it belongs to a task"""
    return container.plain is None


def is_plain(container: Container, _: LifeEvent) -> bool:
    """it is a plain container"""
    return container.plain is not None


def is_prepared(container: Container, event: Start) -> bool:
    """a task's with its networks, without secret variables"""
    return is_attached(container, event) and not event.secret_env


def is_attached(container: Container, _: Start) -> bool:
    """a task's with its networks"""
    return container.plain is None and container.sandbox is not None


def is_unfilled(container: Container, _: Start) -> bool:
    """its volumes are not filled yet"""
    return container.is_unfilled


def is_not_due(container: Container, event: Start) -> bool:
    """by the policy, which no longer applies"""
    return event.by_policy and not (container.is_restarting or event.ignore_stop)


def is_by_policy(container: Container, event: Attempted) -> bool:
    """by the restart policy, and the user has not started it meanwhile"""
    return event.by_policy and not container.is_at_rest


def is_this_run(container: Container, event: Pause | Unpause | Frozen | Thawed | Probed) -> bool:
    """the same run"""
    return container.process == event.process


def thaws(container: Container, event: Signal) -> bool:
    """the signal ends a container"""
    return ends_pause(event.number, container.config.stop_signal)


def changes_health(container: Container, event: Probed) -> bool:
    """the same run, with another health"""
    before = container.health
    return is_this_run(container, event) and (before is None or before.status is not event.health.status)


def cannot_connect(container: Container, event: Connect | Disconnect) -> bool:
    """its networks do not allow it"""
    return network_rules.refusal(container, event) is not None


def is_connected(container: Container, event: Disconnect) -> bool:
    """its run is connected"""
    return network_rules.is_builtin(event) or network_rules.endpoint(container, event) is not None


def is_kept(container: Container, event: RemoveContainer) -> bool:
    """without force, and it is running or restarting"""
    return container.is_active and not event.force


def is_cancelled(_: Container, event: EffectFailed) -> bool:
    """the caller was cancelled"""
    return event.is_cancelled


def has_run(_: Container, event: Adopted) -> bool:
    """its process was started"""
    return event.has_run


def is_frozen(_: Container, event: Adopted) -> bool:
    """it is frozen"""
    return event.is_frozen


def waits_with_network(container: Container, event: Adopted) -> bool:
    """a task's, not retired, with its networks"""
    return _waits(container, event) and event.has_network


def waits_without_network(container: Container, event: Adopted) -> bool:
    """a task's, not retired, without its networks"""
    return _waits(container, event) and not container.error


def _waits(container: Container, event: Adopted) -> bool:
    return container.plain is None and not container.is_retired and not container.was_started


def has_leftovers(_: Container, event: Adopted) -> bool:
    """a run has left resources behind"""
    return event.has_leftovers


# --- refusals, in Docker's words ----------------------------------------------------------------------------------


def being_removed(_: Container, __: LifeEvent) -> SkepError:
    return BeingRemoved("container is marked for removal and cannot be started")


def being_created(container: Container, _: LifeEvent) -> SkepError:
    return Conflicting(f"Container {container.id} is being created: its volumes are not filled yet")


def not_running(container: Container, _: LifeEvent) -> SkepError:
    return NotRunning(f"Container {container.id} is not running")


def still_running(container: Container, _: LifeEvent) -> SkepError:
    if container.state is ContainerState.PAUSED:
        return StillRunning("container is paused and must be unpaused first")
    status = container.status
    return StillRunning(f"container is {status}: stop the container before removing or force remove")


def exec_refused(container: Container, event: Exec) -> SkepError:
    if container.state is ContainerState.PAUSED:
        return NotRunning(f"Container {event.word} is paused, unpause the container before exec")
    if container.is_restarting:
        return NotRunning(f"Container {container.id} is restarting, wait until the container is running")
    return not_running(container, event)


def update_refused(container: Container, _: Update) -> SkepError:
    text = f'Cannot update container {container.id}: container is marked for removal and cannot be "update"'
    return BeingRemoved(text)


def rename_refused(_: Container, __: LifeEvent) -> SkepError:
    return BeingRemoved("container is marked for removal and cannot be renamed")


def networks_kept(container: Container, _: LifeEvent) -> SkepError:
    what = "marked for removal and cannot be connected or disconnected to the network"
    return BeingRemoved(f"Container {container.id} is {what}")


def networks_refused(container: Container, event: Connect | Disconnect) -> SkepError:
    error = network_rules.refusal(container, event)
    assert error is not None, "the condition of its rule"
    return error
