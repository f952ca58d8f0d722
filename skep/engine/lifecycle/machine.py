"""The life of a container as a table: the effects that follow an event in each state.  Pure.

Read ``TABLE`` from top to bottom.  Of the rules for a state and an event, the first whose condition holds applies:

1. ``to`` and ``record`` change the record.  The driver writes it before anything else happens.
2. ``effects`` are carried out one after the other.  Some report an event, which is applied before the next effect.
3. ``then`` is the event that follows them.  ``fails`` is the event that follows instead if one of them fails.

So the record names everything that exists, or the next node process finds it by looking (``Adopted``).  That process
continues from the record at whichever effect the last one ended.

``docs/design/runtime.md`` shows the table.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import msgspec
from msgspec.structs import replace

from skep.engine.container import (
    BeingRemoved,
    Container,
    ContainerState,
    HealthStatus,
    NotRunning,
    PlainOptions,
    StillRunning,
)
from skep.engine.lifecycle.life_events import (
    Adopted,
    AdoptionFailed,
    Attached,
    Attempted,
    Cleaned,
    Create,
    CreateFailed,
    Discard,
    Discarded,
    Event,
    Exited,
    Failure,
    Frozen,
    Made,
    Pause,
    PauseFailed,
    ProcessCreated,
    Release,
    RemovalFailed,
    Remove,
    Retire,
    Retired,
    RunEnded,
    Signal,
    Start,
    Started,
    StartFailed,
    StartUndone,
    Thawed,
    Unpause,
    UserStarts,
    UserStops,
    Written,
)
from skep.engine.signals import ends_pause
from skep.errors import SkepError
from skep.model.times import ZERO_TIME

State = ContainerState


class Effect(Enum):
    """A step that changes or awaits something outside the record.  Repeating it does no harm."""

    MAKE_DIRECTORIES = "make directories"
    AWAIT_NETWORKS = "await the node's networks"
    FIND_SHARED = "find shared namespaces"
    ATTACH_NETWORKS = "attach networks"
    WRITE_BUNDLE = "write bundle"
    AWAIT_RELEASE = "await the last run's release"
    MOUNT_VOLUMES = "mount volumes"
    TAKE_START_SLOT = "take a start slot"
    CREATE_PROCESS = "create process"
    SERVE_CLIENTS = "serve waiting clients"
    START_COMMAND = "start command"
    FORGET_SECRETS = "forget secret variables"
    WATCH = "watch the run"
    PUBLISH_START = "publish start"
    SEND_SIGNAL = "send signal"
    FREEZE = "freeze"
    THAW = "thaw"
    THAW_FOR_SIGNAL = "thaw for the signal"
    SEE_FROZEN = "see whether it is frozen"
    PUBLISH_PAUSE = "publish pause"
    PUBLISH_UNPAUSE = "publish unpause"
    END_PROCESS = "kill and await the end"
    DELETE_PROCESS = "delete process and cgroups"
    ENSURE_DELETED = "ensure that process and cgroups are deleted"
    DETACH_NETWORKS = "detach networks"
    CLEAR_CGROUPS = "clear cgroups"
    RELEASE_ROOT = "unmount root"
    UNMOUNT_VOLUMES = "unmount volumes"
    PUBLISH_EXIT = "publish exit"
    PUBLISH_UNMOUNT = "publish unmount"
    REFUSE_CLIENTS = "refuse waiting clients"
    FORGET_EXECS = "forget execs"
    REMOVE_DIRECTORIES = "remove directories"
    FORGET_RECORD = "forget record"
    PUBLISH_DESTROY = "publish destroy"
    ADOPT_VOLUMES = "adopt volumes"
    ADOPT_API = "adopt API socket"


BEST_EFFORT = frozenset(
    {
        *(Effect.DELETE_PROCESS, Effect.DETACH_NETWORKS, Effect.CLEAR_CGROUPS, Effect.RELEASE_ROOT),
        *(Effect.UNMOUNT_VOLUMES, Effect.THAW_FOR_SIGNAL, Effect.FORGET_SECRETS),
    }
)
"""Effects whose failure is only logged.  A sweep, the next start, a removal or the next process finds the leftovers."""

INTERRUPTIBLE = frozenset(
    {
        *(
            Effect.AWAIT_NETWORKS,
            Effect.AWAIT_RELEASE,
            Effect.MOUNT_VOLUMES,
            Effect.TAKE_START_SLOT,
            Effect.END_PROCESS,
        ),
        *(Effect.UNMOUNT_VOLUMES, Effect.REMOVE_DIRECTORIES),
    }
)
"""Effects that a cancellation interrupts.  They may take minutes, and nothing is lost: they wait, clean up after
themselves, or are repeated by the next process.  All others run to their end and have deadlines."""


# --- rules --------------------------------------------------------------------------------------------------------


class Saving(Enum):
    """How a changed record is written."""

    NOTED = "noted"
    """It counts at once.  A failed write is retried, since the fact does not depend on the disk."""
    FIRST = "first"
    """It must be on disk before the next effect.  Otherwise the effects fail."""
    IF_WRITTEN = "if written"
    """It counts only if it is written."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What follows an event in some states."""

    states: tuple[State, ...]
    event: type[Event]
    when: Callable[[Container, Any], bool] | None = None
    """Condition, whose docstring describes it."""
    to: State | None = None
    """The new state, or None for the same."""
    record: Callable[[Container, Any], Container] | None = None
    """Other changes of the record, described by the function's docstring."""
    saving: Saving = Saving.NOTED
    effects: tuple[Effect, ...] = ()
    then: type[Event] | None = None
    fails: type[Failure] | None = None
    refusal: Callable[[Container], SkepError] | None = None
    """The error of a request that this state refuses."""


def on(states: tuple[State, ...], event: type[Event], effects: tuple[Effect, ...] = (), **rest: Any) -> Rule:
    """Return a rule."""
    return Rule(states=states, event=event, effects=effects, **rest)


class Step(msgspec.Struct, frozen=True):
    """The outcome of an event: the new record, and the rule whose effects follow."""

    container: Container
    rule: Rule
    then: Event | None


def step(container: Container, event: Event) -> Step:
    """Apply ``event`` to a container.  Raises: the refusal of a request."""
    rule = rule_for(container, event)
    if rule.refusal is not None:
        raise rule.refusal(container)
    after = container if rule.record is None else rule.record(container, event)
    if rule.to is not None:
        after = replace(after, state=rule.to)
    then = None
    if rule.then is not None:  # it takes over the fields that both have
        fields = {name: getattr(event, name) for name in rule.then.__struct_fields__}
        then = rule.then(**fields)
    return Step(after, rule, then)


def rule_for(container: Container, event: Event) -> Rule:
    """Return the first rule that applies.  An event without a rule is an error of the program."""
    for rule in _BY_EVENT[type(event)]:
        if container.state in rule.states and (rule.when is None or rule.when(container, event)):
            return rule
    raise AssertionError(f"{type(event).__name__} in state {container.state.value}")


# --- conditions ---------------------------------------------------------------------------------------------------


def _is_task(container: Container, _: Event) -> bool:
    """it belongs to a task"""
    return container.plain is None


def _is_plain(container: Container, _: Event) -> bool:
    """it is a plain container"""
    return container.plain is not None


def _is_prepared(container: Container, event: Start) -> bool:
    """a task's with its networks, without secret variables"""
    return _is_attached(container, event) and not event.secret_env


def _is_attached(container: Container, _: Start) -> bool:
    """a task's with its networks"""
    return container.plain is None and container.sandbox is not None


def _is_not_due(container: Container, event: Start) -> bool:
    """by a policy that no longer wants it"""
    return event.by_policy and not (container.is_restarting or event.ignore_stop)


def _is_by_policy(container: Container, event: Attempted) -> bool:
    """by the restart policy, and its user has not started it meanwhile"""
    return event.by_policy and not container.is_at_rest


def _is_this_run(container: Container, event: Pause | Unpause | Frozen | Thawed) -> bool:
    """the same run"""
    return container.process == event.process


def _thaws(container: Container, event: Signal) -> bool:
    """the signal ends a container"""
    return ends_pause(event.number, container.config.stop_signal)


def _is_kept(container: Container, event: Remove) -> bool:
    """without force, and it is running or restarting"""
    return container.is_active and not event.force


def _is_cancelled(_: Container, event: Failure) -> bool:
    """the caller has left"""
    return event.is_cancelled


def _has_run(_: Container, event: Adopted) -> bool:
    """its process was started"""
    return event.has_run


def _is_frozen(_: Container, event: Adopted) -> bool:
    """it is frozen"""
    return event.is_frozen


def _waits_with_network(container: Container, event: Adopted) -> bool:
    """a task's, not retired, with its networks"""
    return _waits(container, event) and event.has_network


def _waits_without_network(container: Container, event: Adopted) -> bool:
    """a task's, not retired, without its networks"""
    return _waits(container, event) and not container.error


def _waits(container: Container, event: Adopted) -> bool:
    return container.plain is None and not container.is_retired and not container.was_started


def _has_leftovers(_: Container, event: Adopted) -> bool:
    """something of a run is left"""
    return event.has_leftovers


# --- changes of the record ----------------------------------------------------------------------------------------


def _wanted(container: Container, _: Event) -> Container:
    """not stopped, no restarts, policy inactive until its end"""
    return _with_plain(replace(container, is_at_rest=True), is_stopped=False, restarts=0)


def _stopped(container: Container, _: Event) -> Container:
    """stopped by its user"""
    if container.plain is None or container.plain.is_stopped:
        return container
    return _with_plain(container, is_stopped=True)


def _resumed(container: Container, event: Start) -> Container:
    """not stopped, if by policy"""
    if not event.by_policy or container.plain is None or not container.plain.is_stopped:
        return container
    return _with_plain(container, is_stopped=False)


def _counted(container: Container, _: Event) -> Container:
    """one more restart"""
    plain = container.plain or PlainOptions()
    return _with_plain(replace(container, is_at_rest=False), restarts=plain.restarts + 1)


def _with_sandbox(container: Container, event: Attached) -> Container:
    """sandbox"""
    return replace(container, sandbox=event.sandbox)


def _with_warnings(container: Container, event: Written) -> Container:
    """warnings"""
    return container if event.warnings == container.warnings else replace(container, warnings=event.warnings)


def _with_process(container: Container, event: ProcessCreated) -> Container:
    """process and monitor"""
    return replace(container, process=event.process, monitor=event.monitor)


def _began(container: Container, event: Started | Adopted) -> Container:
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


def _ended(container: Container, event: Exited) -> Container:
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


def _undone(container: Container, event: Failure) -> Container:
    """error and exit code, no process, no sandbox"""
    failed = replace(container, exit_code=event.exit_code, error=event.reason)
    return replace(failed, process=None, monitor=None, sandbox=None)


def _retired(container: Container, _: Event) -> Container:
    """retired, no process, no sandbox"""
    return replace(container, process=None, monitor=None, sandbox=None, is_retired=True)


def _without_process(container: Container, _: Event) -> Container:
    """no process"""
    return replace(container, process=None, monitor=None)


def _cleaned(container: Container, _: Event) -> Container:
    """no process, no sandbox, policy active"""
    return replace(container, process=None, monitor=None, sandbox=None, is_at_rest=False)


def _active(container: Container, _: Event) -> Container:
    """policy active"""
    return replace(container, is_at_rest=False) if container.is_at_rest else container


def _with_error(container: Container, event: Failure) -> Container:
    """error"""
    return replace(container, error=event.reason)


def _with_plain(container: Container, **changed: Any) -> Container:
    if container.plain is None:
        return container
    return replace(container, plain=replace(container.plain, **changed))


# --- refusals, in Docker's words ------------------------------------------------------------------------------------


def _being_removed(_: Container) -> SkepError:
    return BeingRemoved("container is marked for removal and cannot be started")


def _not_running(container: Container) -> SkepError:
    return NotRunning(f"Container {container.id} is not running")


def _still_running(container: Container) -> SkepError:
    if container.state is State.PAUSED:
        return StillRunning("container is paused and must be unpaused first")
    status = container.status
    return StillRunning(f"container is {status}: stop the container before removing or force remove")


# --- the table ----------------------------------------------------------------------------------------------------

CREATED, RUNNING, PAUSED = (State.CREATED,), (State.RUNNING,), (State.PAUSED,)
EXITED, REMOVING = (State.EXITED,), (State.REMOVING,)
AT_REST, LIVE, ANY = (*CREATED, *EXITED), (*RUNNING, *PAUSED), tuple(State)
NOT_LIVE = (*AT_REST, *REMOVING)

E = Effect
_BEFORE_START = (E.MOUNT_VOLUMES, E.TAKE_START_SLOT)
_START = (E.CREATE_PROCESS, E.SERVE_CLIENTS, E.START_COMMAND)
_ATTACH = (E.FIND_SHARED, E.ATTACH_NETWORKS, E.WRITE_BUNDLE)
_ADOPT_RUN = (E.ADOPT_VOLUMES, E.ADOPT_API, E.WATCH)
_CLEAN = (E.DELETE_PROCESS, E.DETACH_NETWORKS, E.RELEASE_ROOT, E.UNMOUNT_VOLUMES)
_UNDO = (E.DETACH_NETWORKS, E.REMOVE_DIRECTORIES, E.FORGET_RECORD)
# Without its record, nothing would ever end a process that is left.  So that fails the removal, which is repeated.
_DISCARD = (E.FORGET_EXECS, E.ENSURE_DELETED, E.DETACH_NETWORKS, E.REMOVE_DIRECTORIES)

TABLE = (
    # Creation.  A task's container gets its networks now, a plain one at its start, which may be much later.  Either
    # waits until the networks of earlier processes are restored, because that frees namespaces that it does not know.
    on(
        CREATED,
        Create,
        (E.AWAIT_NETWORKS, E.MAKE_DIRECTORIES, E.ATTACH_NETWORKS, E.WRITE_BUNDLE),
        when=_is_task,
        fails=CreateFailed,
    ),
    on(CREATED, Create, (E.MAKE_DIRECTORIES, E.WRITE_BUNDLE), fails=CreateFailed),
    on(CREATED, Made, when=_is_plain, saving=Saving.FIRST),
    on(CREATED, Made),
    # On disk before the next effect: a crash would leave a sandbox or a process without a record behind.
    on(AT_REST, Attached, record=_with_sandbox, saving=Saving.FIRST),
    on(AT_REST, Written, record=_with_warnings),
    on(AT_REST, ProcessCreated, record=_with_process, saving=Saving.FIRST),
    on(CREATED, CreateFailed, _UNDO, to=State.REMOVING, fails=RemovalFailed),
    # Start.
    on(ANY, UserStarts, record=_wanted, saving=Saving.FIRST),
    on(REMOVING, Start, refusal=_being_removed),
    on(LIVE, Start),
    on(AT_REST, Start, when=_is_not_due),
    on(CREATED, Start, (*_BEFORE_START, *_START), when=_is_prepared, fails=StartFailed),
    on(
        CREATED,
        Start,
        (*_BEFORE_START, E.FIND_SHARED, E.WRITE_BUNDLE, *_START),
        when=_is_attached,
        fails=StartFailed,
    ),
    on(
        AT_REST,
        Start,
        (E.AWAIT_RELEASE, E.AWAIT_NETWORKS, *_BEFORE_START, *_ATTACH, *_START),
        record=_resumed,
        fails=StartFailed,
    ),
    on(
        AT_REST,
        Started,
        (E.WATCH, E.PUBLISH_START, E.FORGET_SECRETS),
        to=State.RUNNING,
        record=_began,
        then=Attempted,
    ),
    # A caller that leaves before the start slot has seen no failure: the container may be started later.
    on(AT_REST, StartFailed, (E.UNMOUNT_VOLUMES,), when=_is_cancelled),
    on(AT_REST, StartFailed, (E.FORGET_SECRETS, *_CLEAN, E.REFUSE_CLIENTS), then=StartUndone),
    on(AT_REST, StartUndone, record=_undone, then=Attempted),
    # Not earlier: the container is restarting until it runs, even in its last attempt.  A full disk uses up no attempt.
    on(ANY, Attempted, when=_is_by_policy, record=_counted, saving=Saving.IF_WRITTEN),
    on(ANY, Attempted),
    # Stop and pause.  The driver sends SIGKILL after the grace period.
    on(ANY, UserStops, record=_stopped),
    on(PAUSED, Signal, (E.SEND_SIGNAL, E.THAW_FOR_SIGNAL, E.SEE_FROZEN), when=_thaws),
    on(LIVE, Signal, (E.SEND_SIGNAL,)),
    on(ANY, Signal),  # it has ended at this moment
    on(LIVE, Pause, (E.FREEZE,), when=_is_this_run, fails=PauseFailed),
    on(ANY, Pause, refusal=_not_running),
    on(LIVE, Frozen, (E.PUBLISH_PAUSE,), when=_is_this_run, to=State.PAUSED),
    on(ANY, Frozen, refusal=_not_running),
    on(LIVE, Unpause, (E.THAW,), when=_is_this_run, fails=PauseFailed),
    on(ANY, Unpause, refusal=_not_running),
    on(LIVE, Thawed, (E.PUBLISH_UNPAUSE,), when=_is_this_run, to=State.RUNNING),
    on(ANY, Thawed, refusal=_not_running),
    # A command that ran into its deadline may have frozen the container all the same.
    on(LIVE, PauseFailed, (E.SEE_FROZEN,)),
    on(ANY, PauseFailed),
    # End.
    on(LIVE, RunEnded, (E.DETACH_NETWORKS,), then=Exited),
    on(LIVE, Exited, (E.PUBLISH_EXIT,), to=State.EXITED, record=_ended),
    on(EXITED, Release, (E.CLEAR_CGROUPS, E.RELEASE_ROOT, E.UNMOUNT_VOLUMES, E.PUBLISH_UNMOUNT)),
    on(CREATED, Retire, (E.DELETE_PROCESS, E.DETACH_NETWORKS, E.RELEASE_ROOT), when=_is_task, then=Retired),
    on(ANY, Retire),
    on(CREATED, Retired, record=_retired),
    # Removal.  From Discard on the container cannot be started, and the next process continues the removal.
    on(ANY, Remove, when=_is_kept, refusal=_still_running),
    on(LIVE, Remove, (E.END_PROCESS, E.AWAIT_RELEASE), record=_stopped, then=Discard),
    on(ANY, Remove, (E.AWAIT_RELEASE,), then=Discard),
    on(NOT_LIVE, Discard, _DISCARD, to=State.REMOVING, then=Discarded, fails=RemovalFailed),
    on(REMOVING, Discarded, (E.FORGET_RECORD, E.REFUSE_CLIENTS, E.PUBLISH_DESTROY)),
    on(REMOVING, RemovalFailed, when=_is_cancelled),
    on(REMOVING, RemovalFailed, record=_with_error),
    # A new node process.
    on(REMOVING, Adopted, then=Discard),
    on(LIVE, Adopted, _ADOPT_RUN, when=_is_frozen, to=State.PAUSED),
    on(LIVE, Adopted, _ADOPT_RUN, to=State.RUNNING),
    # The last process ended between the start and its record.
    on(AT_REST, Adopted, _ADOPT_RUN, when=_has_run, to=State.RUNNING, record=_began),
    on(
        CREATED,
        Adopted,
        (E.DELETE_PROCESS, E.WRITE_BUNDLE),
        when=_waits_with_network,
        record=_without_process,
        fails=AdoptionFailed,
    ),
    on(
        CREATED,
        Adopted,
        (E.DELETE_PROCESS, *_ATTACH),
        when=_waits_without_network,
        record=_without_process,
        fails=AdoptionFailed,
    ),
    on(CREATED, AdoptionFailed, _CLEAN, then=StartUndone),
    on(AT_REST, Adopted, _CLEAN, when=_has_leftovers, then=Cleaned),
    on(AT_REST, Cleaned, record=_cleaned),
    on(AT_REST, Adopted, record=_active),
)

_BY_EVENT = {
    event: tuple(rule for rule in TABLE if rule.event is event) for event in {rule.event for rule in TABLE}
}
