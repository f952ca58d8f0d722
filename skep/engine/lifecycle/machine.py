"""The life of a container as a table: the effects of an event in each state.  Pure.

Read ``TABLE`` from top to bottom.  Of the rules for a state and an event, the first whose condition holds applies:

1. ``to`` and ``record`` change the record.  The driver writes it before anything else happens.
2. ``effects`` are carried out one after the other.  Some report an event, which is applied before the next effect.
3. ``then`` is the event that follows them.  ``fails`` is the event that follows instead if one of them fails.

So the record names everything that exists.  The next node process finds anything else when it examines the node
(``Adopted``), and continues from the record, at whichever effect the last process stopped.

``docs/design/runtime.md`` shows the table.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import msgspec
from msgspec.structs import replace

from skep.engine.containers.container import Container, ContainerState
from skep.engine.lifecycle import changes, conditions
from skep.engine.lifecycle.life_events import (
    Adopted,
    Attached,
    Attempted,
    BundleWritten,
    Cleaned,
    Connect,
    Create,
    CreateFailed,
    DirectoriesMade,
    Discard,
    Discarded,
    Disconnect,
    EffectFailed,
    Exec,
    Exited,
    Frozen,
    LifeEvent,
    NetworksChanged,
    Pause,
    PauseFailed,
    Probed,
    ProcessCreated,
    ReleaseRun,
    RemovalFailed,
    RemoveContainer,
    Rename,
    RenameFailed,
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
    Update,
    Updated,
    UserStarts,
    UserStops,
)
from skep.errors import SkepError

State = ContainerState


class Effect(Enum):
    """A step that changes or awaits something outside the record.  It is safe to repeat."""

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
    SEE_FROZEN = "check whether it is frozen"
    PUBLISH_PAUSE = "publish pause"
    PUBLISH_UNPAUSE = "publish unpause"
    PUBLISH_HEALTH = "publish health"
    APPLY_LIMITS = "apply limits"
    PUBLISH_UPDATE = "publish update"
    CHANGE_NETWORKS = "change networks"
    WRITE_NAME_FILES = "write name files"
    PUBLISH_NETWORKS = "publish networks"
    RENAME_ON_NETWORKS = "rename on its networks"
    RENAME_BACK = "rename back on its networks"
    RELEASE_NAME = "release the other name"
    PUBLISH_RENAME = "publish rename"
    END_PROCESS = "kill and await the exit"
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
        *(Effect.WRITE_NAME_FILES, Effect.RENAME_BACK),
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
"""Effects that a cancellation interrupts.  They may take minutes, and are safe to interrupt: they only wait, clean up
after themselves, or are repeated by the next process.  All other effects have deadlines and finish first.
"""


# --- rules --------------------------------------------------------------------------------------------------------


class Saving(Enum):
    """Way of writing a changed record."""

    NOTED = "noted"
    """The change takes effect at once, because it has already happened.  A failed write is retried."""
    FIRST = "first"
    """The change must be on disk before the next effect.  If the write fails, so do the effects."""
    IF_WRITTEN = "if written"
    """The change takes effect only if it is written."""
    REPORTED = "reported"
    """The change takes effect at once, and its effects follow.  A failed write is retried, but the request fails."""


class LifeRule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of the table: the changes and effects that follow an event in some states."""

    states: tuple[State, ...]
    event: type[LifeEvent]
    when: Callable[[Container, Any], bool] | None = None
    """Condition, whose docstring describes it."""
    to: State | None = None
    """The new state, or None for the same."""
    record: Callable[[Container, Any], Container] | None = None
    """Other changes of the record, described by the function's docstring."""
    saving: Saving = Saving.NOTED
    effects: tuple[Effect, ...] = ()
    then: type[LifeEvent] | None = None
    fails: type[EffectFailed] | None = None
    refusal: Callable[[Container, Any], SkepError] | None = None
    """The error of a request that this state refuses."""


def on(
    states: tuple[State, ...], event: type[LifeEvent], effects: tuple[Effect, ...] = (), **rest: Any
) -> LifeRule:
    """Return a rule."""
    return LifeRule(states=states, event=event, effects=effects, **rest)


class LifeStep(msgspec.Struct, frozen=True):
    """The outcome of an event: the new record, and the rule whose effects follow."""

    container: Container
    rule: LifeRule
    then: LifeEvent | None


def step(container: Container, event: LifeEvent) -> LifeStep:
    """Apply ``event`` to a container.  Raises: the refusal of a request."""
    rule = rule_for(container, event)
    if rule.refusal is not None:
        raise rule.refusal(container, event)
    after = container if rule.record is None else rule.record(container, event)
    if rule.to is not None:
        after = replace(after, state=rule.to)
    then = None
    if rule.then is not None:  # the event takes over the fields that both have
        fields = {name: getattr(event, name) for name in rule.then.__struct_fields__}
        then = rule.then(**fields)
    return LifeStep(after, rule, then)


def rule_for(container: Container, event: LifeEvent) -> LifeRule:
    """Return the first rule that applies.  Raises: AssertionError: no rule applies, which is a bug."""
    for rule in _BY_EVENT[type(event)]:
        if container.state in rule.states and (rule.when is None or rule.when(container, event)):
            return rule
    raise AssertionError(f"{type(event).__name__} in state {container.state.value}")


# --- the table ----------------------------------------------------------------------------------------------------

CREATED, RUNNING, PAUSED = (State.CREATED,), (State.RUNNING,), (State.PAUSED,)
EXITED, REMOVING = (State.EXITED,), (State.REMOVING,)
AT_REST, LIVE, ANY = (*CREATED, *EXITED), (*RUNNING, *PAUSED), tuple(State)
NOT_LIVE, KEPT = (*AT_REST, *REMOVING), (*AT_REST, *LIVE)

E = Effect
_BEFORE_START = (E.MOUNT_VOLUMES, E.TAKE_START_SLOT)
_START = (E.CREATE_PROCESS, E.SERVE_CLIENTS, E.START_COMMAND)
_ATTACH = (E.FIND_SHARED, E.ATTACH_NETWORKS, E.WRITE_BUNDLE)
_ADOPT_RUN = (E.ADOPT_VOLUMES, E.ADOPT_API, E.WATCH)
_CLEAN = (E.DELETE_PROCESS, E.DETACH_NETWORKS, E.RELEASE_ROOT, E.UNMOUNT_VOLUMES)
_UNDO = (E.DETACH_NETWORKS, E.REMOVE_DIRECTORIES, E.FORGET_RECORD)
# Without its record, nothing would ever kill a leftover process. So the removal fails, and is repeated.
_DISCARD = (E.FORGET_EXECS, E.ENSURE_DELETED, E.DETACH_NETWORKS, E.REMOVE_DIRECTORIES)

TABLE = (
    # Creation. A task's container gets its networks now, a plain container at its start, which may be much later. Both
    # wait until the networks of earlier processes are restored, because restoring frees unknown namespaces.
    on(
        CREATED,
        Create,
        (E.AWAIT_NETWORKS, E.MAKE_DIRECTORIES, E.ATTACH_NETWORKS, E.WRITE_BUNDLE),
        when=conditions.is_task,
        fails=CreateFailed,
    ),
    on(CREATED, Create, (E.MAKE_DIRECTORIES, E.WRITE_BUNDLE), fails=CreateFailed),
    on(CREATED, DirectoriesMade, when=conditions.is_plain, saving=Saving.FIRST),
    on(CREATED, DirectoriesMade),
    # On disk before the next effect, because a crash would leave behind a sandbox or a process without a record.
    on(AT_REST, Attached, record=changes.with_sandbox, saving=Saving.FIRST),
    on(AT_REST, BundleWritten, record=changes.with_warnings),
    on(AT_REST, ProcessCreated, record=changes.with_process, saving=Saving.FIRST),
    on(CREATED, CreateFailed, _UNDO, to=State.REMOVING, fails=RemovalFailed),
    # Start.
    on(ANY, UserStarts, record=changes.wanted, saving=Saving.FIRST),
    on(REMOVING, Start, refusal=conditions.being_removed),
    on(CREATED, Start, when=conditions.is_unfilled, refusal=conditions.being_created),
    on(LIVE, Start),
    on(AT_REST, Start, when=conditions.is_not_due),
    on(CREATED, Start, (*_BEFORE_START, *_START), when=conditions.is_prepared, fails=StartFailed),
    on(
        CREATED,
        Start,
        (*_BEFORE_START, E.FIND_SHARED, E.WRITE_BUNDLE, *_START),
        when=conditions.is_attached,
        fails=StartFailed,
    ),
    on(
        AT_REST,
        Start,
        (E.AWAIT_RELEASE, E.AWAIT_NETWORKS, *_BEFORE_START, *_ATTACH, *_START),
        record=changes.resumed,
        fails=StartFailed,
    ),
    on(
        AT_REST,
        Started,
        (E.WATCH, E.PUBLISH_START, E.FORGET_SECRETS),
        to=State.RUNNING,
        record=changes.began,
        then=Attempted,
    ),
    # A start that is cancelled before its start slot has not failed, so the container may be started later.
    on(AT_REST, StartFailed, (E.UNMOUNT_VOLUMES,), when=conditions.is_cancelled),
    on(AT_REST, StartFailed, (E.FORGET_SECRETS, *_CLEAN, E.REFUSE_CLIENTS), then=StartUndone),
    on(AT_REST, StartUndone, record=changes.undone, then=Attempted),
    # Not earlier, because the container is restarting until it runs. So a full disk does not use up an attempt.
    on(ANY, Attempted, when=conditions.is_by_policy, record=changes.counted, saving=Saving.IF_WRITTEN),
    on(ANY, Attempted),
    # Stop and pause.  The driver sends SIGKILL after the grace period.
    on(ANY, UserStops, record=changes.stopped),
    on(PAUSED, Signal, (E.SEND_SIGNAL, E.THAW_FOR_SIGNAL, E.SEE_FROZEN), when=conditions.thaws),
    on(LIVE, Signal, (E.SEND_SIGNAL,)),
    on(ANY, Signal),  # it has ended at this moment
    on(LIVE, Pause, (E.FREEZE,), when=conditions.is_this_run, fails=PauseFailed),
    on(ANY, Pause, refusal=conditions.not_running),
    on(LIVE, Frozen, (E.PUBLISH_PAUSE,), when=conditions.is_this_run, to=State.PAUSED),
    on(ANY, Frozen, refusal=conditions.not_running),
    on(LIVE, Unpause, (E.THAW,), when=conditions.is_this_run, fails=PauseFailed),
    on(ANY, Unpause, refusal=conditions.not_running),
    on(LIVE, Thawed, (E.PUBLISH_UNPAUSE,), when=conditions.is_this_run, to=State.RUNNING),
    on(ANY, Thawed, refusal=conditions.not_running),
    # A command that exceeded its deadline may still have frozen the container.
    on(LIVE, PauseFailed, (E.SEE_FROZEN,)),
    on(ANY, PauseFailed),
    # Changes. An exec has its own life, which begins only while the container runs.
    on(RUNNING, Exec),
    on(ANY, Exec, refusal=conditions.exec_refused),
    on(LIVE, Probed, (E.PUBLISH_HEALTH,), when=conditions.changes_health, record=changes.with_health),
    on(LIVE, Probed, when=conditions.is_this_run, record=changes.with_health),
    on(ANY, Probed),  # of an earlier run
    on(REMOVING, Update, refusal=conditions.update_refused),
    on(KEPT, Update, (E.APPLY_LIMITS,)),
    on(KEPT, Updated, (E.PUBLISH_UPDATE,), record=changes.updated, saving=Saving.FIRST),
    on(REMOVING, Connect, refusal=conditions.networks_kept),
    on(KEPT, Connect, when=conditions.cannot_connect, refusal=conditions.networks_refused),
    # The record of a change of networks must be on disk first, so that a crash does not lose the change.
    on(LIVE, Connect, (E.AWAIT_NETWORKS, E.CHANGE_NETWORKS), saving=Saving.FIRST),
    on(AT_REST, Connect, record=changes.with_next_networks, saving=Saving.FIRST),
    on(REMOVING, Disconnect, refusal=conditions.networks_kept),
    on(KEPT, Disconnect, when=conditions.cannot_connect, refusal=conditions.networks_refused),
    on(
        LIVE,
        Disconnect,
        (E.AWAIT_NETWORKS, E.CHANGE_NETWORKS),
        when=conditions.is_connected,
        saving=Saving.FIRST,
    ),
    on(KEPT, Disconnect, record=changes.with_next_networks, saving=Saving.FIRST),
    on(
        LIVE,
        NetworksChanged,
        (E.WRITE_NAME_FILES, E.PUBLISH_NETWORKS),
        record=changes.with_networks,
        saving=Saving.REPORTED,
    ),
    # The container keeps both names until the networks have one of them.
    on(REMOVING, Rename, refusal=conditions.rename_refused),
    on(
        KEPT,
        Rename,
        (E.AWAIT_NETWORKS, E.RENAME_ON_NETWORKS, E.RELEASE_NAME, E.PUBLISH_RENAME),
        record=changes.renamed,
        saving=Saving.FIRST,
        fails=RenameFailed,
    ),
    on(KEPT, RenameFailed, (E.RENAME_BACK, E.RELEASE_NAME), record=changes.renamed_back),
    # End.
    on(LIVE, RunEnded, (E.DETACH_NETWORKS,), then=Exited),
    on(LIVE, Exited, (E.PUBLISH_EXIT,), to=State.EXITED, record=changes.ended),
    on(EXITED, ReleaseRun, (E.CLEAR_CGROUPS, E.RELEASE_ROOT, E.UNMOUNT_VOLUMES, E.PUBLISH_UNMOUNT)),
    on(
        CREATED,
        Retire,
        (E.DELETE_PROCESS, E.DETACH_NETWORKS, E.RELEASE_ROOT),
        when=conditions.is_task,
        then=Retired,
    ),
    on(ANY, Retire),
    on(CREATED, Retired, record=changes.retired),
    # Removal.  From Discard on the container cannot be started, and the next process continues the removal.
    on(ANY, RemoveContainer, when=conditions.is_kept, refusal=conditions.still_running),
    on(LIVE, RemoveContainer, (E.END_PROCESS, E.AWAIT_RELEASE), record=changes.stopped, then=Discard),
    on(ANY, RemoveContainer, (E.AWAIT_RELEASE,), then=Discard),
    on(NOT_LIVE, Discard, _DISCARD, to=State.REMOVING, then=Discarded, fails=RemovalFailed),
    on(REMOVING, Discarded, (E.FORGET_RECORD, E.REFUSE_CLIENTS, E.PUBLISH_DESTROY)),
    on(REMOVING, RemovalFailed, when=conditions.is_cancelled),
    on(REMOVING, RemovalFailed, record=changes.with_error),
    # A new node process.
    on(REMOVING, Adopted, then=Discard),
    on(LIVE, Adopted, _ADOPT_RUN, when=conditions.is_frozen, to=State.PAUSED),
    on(LIVE, Adopted, _ADOPT_RUN, to=State.RUNNING),
    # The last node process ended between the start and its record.
    on(AT_REST, Adopted, _ADOPT_RUN, when=conditions.has_run, to=State.RUNNING, record=changes.began),
    on(
        CREATED,
        Adopted,
        (E.DELETE_PROCESS, E.WRITE_BUNDLE),
        when=conditions.waits_with_network,
        record=changes.without_process,
    ),
    on(
        CREATED,
        Adopted,
        (E.DELETE_PROCESS, *_ATTACH),
        when=conditions.waits_without_network,
        record=changes.without_process,
    ),
    on(AT_REST, Adopted, _CLEAN, when=conditions.has_leftovers, then=Cleaned),
    on(AT_REST, Cleaned, record=changes.cleaned),
    on(AT_REST, Adopted, record=changes.active),
)

_BY_EVENT = {
    event: tuple(rule for rule in TABLE if rule.event is event) for event in {rule.event for rule in TABLE}
}
