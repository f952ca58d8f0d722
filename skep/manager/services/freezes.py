"""Change freezes and maintenance windows: whether Skep may act by itself now, and who may change what.

They are a part of the cluster object.  A freeze holds as long as it is there, because the leader removes it at its end
(``schedules.loop``).  So decisions need no clock, and each change is a commit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Concatenate, Literal, ParamSpec, TypeAlias, TypeVar

from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from skep.manager.cluster import cluster_of, known_cluster
from skep.model.options.freezes import (
    ADMIN_OVERRIDES,
    CLUSTER,
    STACKS_MAX,
    ChangeFreeze,
    FreezeRequest,
    MaintenanceWindow,
    checked_freeze,
    checked_window,
    ended,
    never_meet,
    window_at,
)
from skep.model.permissions.access import OVERRIDE_HEADER
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import Transaction, View
from skep.store.schema import stack_index

FreezeAction: TypeAlias = Literal[
    "begin-freeze", "end-freeze", "open-window", "close-window", "remove-window"
]
"""Actions of events."""
P = ParamSpec("P")
R = TypeVar("R")


# -- what waits --------------------------------------------------------------------------------------------------------


def held_by(view: View, stack: str = "") -> str:
    """Return why Skep does not change objects of ``stack`` by itself now, or an empty text if it does."""
    swarm = known_cluster(view)
    return why_held(swarm, stack) if swarm is not None else ""


def why_held(swarm: Swarm, stack: str = "") -> str:
    """Return ``held_by`` for a cluster object."""
    for scope in (CLUSTER, stack):
        if (freeze := swarm.change_freezes.get(scope)) is not None:
            return freeze.words(scope)
    for scope in (CLUSTER, stack):
        window = window_of(swarm, scope)
        if window is not None and window.closed_until:
            return window.words(scope)
    return ""


def window_of(swarm: Swarm, scope: str) -> MaintenanceWindow | None:
    """Return the window of a stack, or of the cluster if ``scope`` is empty."""
    return swarm.stack_windows.get(scope) if scope else swarm.window


def is_held_at_commit(tx: Transaction, stack: str) -> bool:
    """Return whether ``stack`` is held, and let the commit fail if that changes."""
    swarms = [found for one in tx.find(Swarm) if (found := tx.rely_on(Swarm, one.id, "holds"))]
    return any(why_held(swarm, stack) for swarm in swarms)


def freeze_changes(old: Swarm, new: Swarm) -> Iterator[tuple[FreezeAction, Mapping[str, str]]]:
    """Yield the action and the facts of each event about freezes and the window."""
    for scope in sorted({*old.change_freezes, *new.change_freezes}):
        before, after = old.change_freezes.get(scope), new.change_freezes.get(scope)
        facts = {"stack": scope} if scope else {}
        if after is not None and after != before:
            facts |= {"until": after.until, "by": after.by, "reason": after.reason}
            yield "begin-freeze", {**facts, "message": after.words(scope)}
        elif after is None:
            yield (
                "end-freeze",
                {**facts, "message": f"{f'stack {scope}' if scope else 'the cluster'} is not frozen"},
            )
    for scope in (CLUSTER, *sorted({*old.stack_windows, *new.stack_windows})):
        earlier, window = window_of(old, scope), window_of(new, scope)
        facts = {"stack": scope} if scope else {}
        subject = f"the maintenance window of stack {scope}" if scope else "the maintenance window"
        if window is not None and window != earlier:
            is_open = not window.closed_until
            words = f"{subject} is open" if is_open else window.words(scope)
            yield "open-window" if is_open else "close-window", {**facts, "message": words}
        elif earlier is not None and window is None:
            yield "remove-window", {**facts, "message": f"{subject} was removed"}


def held_stacks(swarm: Swarm) -> frozenset[str]:
    """Return the stacks that have a freeze of their own, or a window that is closed."""
    closed = (stack for stack, window in swarm.stack_windows.items() if window.closed_until)
    return frozenset((*swarm.change_freezes, *closed)) - {CLUSTER}


def stack_of_service(service: Service | None) -> str:
    """Return the service's stack, or an empty text."""
    return service.spec.labels.get(STACK_LABEL, "") if service is not None else ""


# -- what users may not do during a strict freeze ----------------------------------------------------------------------


def unless_frozen(
    operation: Callable[Concatenate[Transaction, P], R], *stacks: str, is_override: bool, is_admin: bool
) -> Callable[Concatenate[Transaction, P], R]:
    """Return ``operation`` with a check of strict freezes, now and when the transaction commits.

    Args:
        stacks: Stacks of the object before and after the operation.
        is_override: Whether the user overrides a freeze of the stack, or as an administrator of the cluster.
    """

    def run(tx: Transaction, /, *args: P.args, **kwargs: P.kwargs) -> R:
        require_unfrozen(tx, *stacks, is_override=is_override, is_admin=is_admin)
        return operation(tx, *args, **kwargs)

    return run


def require_unfrozen(tx: Transaction, *stacks: str, is_override: bool, is_admin: bool) -> None:
    """Check that no strict freeze refuses the user's change.

    Raises:
        FailedPrecondition: There is one.
        PermissionDenied: The user may not override it.
    """
    known = known_cluster(tx)
    swarm = tx.rely_on(Swarm, known.id, "holds") if known is not None else None
    if swarm is None:
        return
    for scope in (CLUSTER, *stacks):
        freeze = swarm.change_freezes.get(scope)
        if freeze is None or not freeze.is_strict:
            continue
        if not is_override:
            raise FailedPrecondition(
                f"{freeze.words(scope)}. Wait, end it ({_command(scope)}), or override it: skep stack deploy and "
                f"skep node drain have --override-freeze, other requests the header {OVERRIDE_HEADER}: true"
            )
        if scope == CLUSTER and not is_admin:
            raise PermissionDenied(f"{freeze.words(scope)}. {ADMIN_OVERRIDES}")


def _command(scope: str) -> str:
    return f"skep stack unfreeze {scope}" if scope else "skep cluster unfreeze"


# -- changes -----------------------------------------------------------------------------------------------------------


def set_freeze(tx: Transaction, scope: str, wanted: FreezeRequest, *, by: str, now_ns: int) -> ChangeFreeze:
    """Freeze the cluster or a stack, or renew its freeze.

    Raises:
        InvalidArgument: The end is missing, past or too late.
        NotFound: The stack has no services.
        ResourceExhausted: Too many stacks are frozen.
    """
    swarm = tx.get(Swarm, cluster_of(tx).id)
    freeze = checked_freeze(wanted, by, now_ns)
    if scope:
        _require_services(tx, scope)
    freezes = {**swarm.change_freezes, scope: freeze}
    if len(freezes) > STACKS_MAX:
        raise ResourceExhausted(f"{STACKS_MAX} freezes are in force: end one of them first")
    tx.put(replace(swarm, change_freezes=freezes))
    return freeze


def end_freeze(tx: Transaction, scope: str) -> None:
    """End a freeze.  Raises: NotFound: there is none."""
    swarm = tx.get(Swarm, cluster_of(tx).id)
    if scope not in swarm.change_freezes:
        raise NotFound(f"{f'stack {scope}' if scope else 'the cluster'} is not frozen")
    tx.put(replace(swarm, change_freezes={k: v for k, v in swarm.change_freezes.items() if k != scope}))


def set_window(
    tx: Transaction, wanted: MaintenanceWindow | None, scope: str = CLUSTER, *, now_ns: int
) -> MaintenanceWindow | None:
    """Set the maintenance window of the cluster or a stack, or remove it.

    Raises:
        InvalidArgument: It would never open or never close, or never be open together with the cluster's window.
        NotFound: The stack has no services, or no window to remove.
        ResourceExhausted: Too many stacks have a window.
    """
    swarm = tx.get(Swarm, cluster_of(tx).id)
    window = checked_window(wanted, now_ns) if wanted is not None else None
    if not scope:
        tx.put(replace(swarm, window=window))
        return window
    windows = {stack: one for stack, one in swarm.stack_windows.items() if stack != scope}
    if window is not None:
        _require_services(tx, scope)
        if swarm.window is not None and never_meet(window, swarm.window, now_ns):
            raise InvalidArgument(
                f"the window would never be open at the same time as the cluster's ({swarm.window.times}), so "
                f"nothing of stack {scope} could ever move: choose other times"
            )
        windows[scope] = window
    elif len(windows) == len(swarm.stack_windows):
        raise NotFound(f"stack {scope} has no maintenance window")
    if len(windows) > STACKS_MAX:
        raise ResourceExhausted(f"{STACKS_MAX} stacks have a maintenance window: remove one of them first")
    tx.put(replace(swarm, stack_windows=windows))
    return window


def _require_services(view: View, stack: str) -> None:
    if not _has_services(view, stack):
        raise NotFound(f"stack {stack} has no services: list stacks with skep stack ls")


def _has_services(view: View, stack: str) -> bool:
    return any(one.removed_at is None for one in view.find(Service, stack=stack_index(stack)))


def has_freezes(view: View) -> bool:
    """Return whether there is a freeze or a window, so that one may begin or end."""
    return any(one.change_freezes or one.window is not None or one.stack_windows for one in view.find(Swarm))


def is_out_of_date(view: View, now_ns: int) -> bool:
    """Return whether a freeze is over, or a window has to open, close or go."""
    return any(_at(swarm, view, now_ns) != swarm for swarm in view.find(Swarm))


def bring_up_to_date(tx: Transaction, now_ns: int) -> None:
    """Remove the freezes that are over and the windows of removed stacks, and open or close the others."""
    for swarm in tx.find(Swarm):
        present = _at(swarm, tx, now_ns)
        if present != swarm:
            tx.put(present)


def _at(swarm: Swarm, view: View, now_ns: int) -> Swarm:
    over = ended(swarm.change_freezes, now_ns)
    if not over and swarm.window is None and not swarm.stack_windows:
        return swarm
    freezes = {scope: one for scope, one in swarm.change_freezes.items() if scope not in over}
    window = window_at(swarm.window, now_ns) if swarm.window is not None else None
    windows = {
        stack: window_at(one, now_ns)
        for stack, one in swarm.stack_windows.items()
        if _has_services(view, stack) or view.unreadable(Service)  # such a service may be of any stack
    }
    return replace(swarm, change_freezes=freezes, window=window, stack_windows=windows)
