"""Change freezes and the maintenance window: whether Skep may act by itself now, and who may change what.

They are a part of the cluster object.  A freeze holds as long as it is there, because the leader removes it at its end
(``schedules.loop``).  So decisions need no clock, and each change is a commit.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Concatenate, Literal, ParamSpec, TypeAlias, TypeVar

from msgspec.structs import replace

from skep.api.access.permissions import STACK_LABEL
from skep.errors import FailedPrecondition, NotFound, PermissionDenied, ResourceExhausted
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
    window_at,
)
from skep.model.permissions.access import OVERRIDE_HEADER
from skep.model.service import Service
from skep.model.swarm import Swarm
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
    window = swarm.window
    return window.words() if window is not None and window.closed_until else ""


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
    if old.window != new.window and new.window is not None:
        is_open = not new.window.closed_until
        words = "the maintenance window is open" if is_open else new.window.words()
        yield "open-window" if is_open else "close-window", {"message": words}
    elif old.window is not None and new.window is None:
        yield "remove-window", {"message": "the maintenance window was removed"}


def frozen_stacks(view: View) -> Collection[str]:
    """Return the stacks that have a freeze of their own."""
    swarm = known_cluster(view)
    return {*swarm.change_freezes} - {CLUSTER} if swarm is not None else ()


def stack_of_service(service: Service | None) -> str:
    """Return the service's stack, or an empty text."""
    return service.spec.labels.get(STACK_LABEL, "") if service is not None else ""


# -- what users may not do during a strict freeze ----------------------------------------------------------------------


def unless_frozen(
    operation: Callable[Concatenate[Transaction, P], R], stack: str, *, is_override: bool, is_admin: bool
) -> Callable[Concatenate[Transaction, P], R]:
    """Return ``operation`` with a check of strict freezes.

    Args:
        is_override: Whether the user overrides a freeze of the stack, or as an administrator of the cluster.
    """

    def run(tx: Transaction, /, *args: P.args, **kwargs: P.kwargs) -> R:
        require_unfrozen(tx, stack, is_override=is_override, is_admin=is_admin)
        return operation(tx, *args, **kwargs)

    return run


def require_unfrozen(view: View, stack: str, *, is_override: bool, is_admin: bool) -> None:
    """Check that no strict freeze refuses the user's change.

    Raises:
        FailedPrecondition: There is one.
        PermissionDenied: The user may not override it.
    """
    swarm = known_cluster(view)
    if swarm is None:
        return
    for scope in (CLUSTER, stack):
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
    if scope and not any(one.removed_at is None for one in tx.find(Service, stack=stack_index(scope))):
        raise NotFound(f"stack {scope} has no services")
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


def set_window(tx: Transaction, wanted: MaintenanceWindow | None, *, now_ns: int) -> MaintenanceWindow | None:
    """Set the maintenance window, or remove it.  Raises: InvalidArgument."""
    swarm = tx.get(Swarm, cluster_of(tx).id)
    window = checked_window(wanted, now_ns) if wanted is not None else None
    tx.put(replace(swarm, window=window))
    return window


def has_freezes(view: View) -> bool:
    """Return whether there is a freeze or a window, so that one may begin or end."""
    return any(swarm.change_freezes or swarm.window is not None for swarm in view.find(Swarm))


def is_out_of_date(view: View, now_ns: int) -> bool:
    """Return whether a freeze is over, or the window has to open or close."""
    return any(_at(swarm, now_ns) != swarm for swarm in view.find(Swarm))


def bring_up_to_date(tx: Transaction, now_ns: int) -> None:
    """Remove the freezes that are over, and open or close the window."""
    for swarm in tx.find(Swarm):
        present = _at(swarm, now_ns)
        if present != swarm:
            tx.put(present)


def _at(swarm: Swarm, now_ns: int) -> Swarm:
    over = ended(swarm.change_freezes, now_ns)
    if not over and swarm.window is None:
        return swarm
    freezes = {scope: one for scope, one in swarm.change_freezes.items() if scope not in over}
    window = window_at(swarm.window, now_ns) if swarm.window is not None else None
    return replace(swarm, change_freezes=freezes, window=window)
