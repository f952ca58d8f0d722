"""The stored part of rebalancing: the setting for returned nodes, and the run that is in progress."""

from typing import Final

import msgspec
from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, NotFound
from skep.manager.rebalance.plan import PlannedMove, locked_nodes
from skep.manager.services.freezes import held_by, is_held_at_commit, stack_of_service
from skep.model.node import Node, takes_tasks
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Relocation, Task, TaskState
from skep.model.values.counts import counted
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import ServiceId
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction, View
from skep.store.keys import HEAD
from skep.store.kinds import Payload

REBALANCE_ID: Final = "rebalance"
"""Id of the payload with the record.  Managers of older versions ignore it."""
AFTER_RETURN_S_MIN, AFTER_RETURN_S_MAX = 30, 86_400
"""Limits of the wait after the return of a node.  Nodes that restart return several times in half a minute."""
MOVE_S = 300.0
"""Seconds after which a move is given up.  Pulling a large image takes minutes."""
MOVED_MAX = 5000
"""Moves of one run.  A plan ends, but changes of users during the run may cause further moves."""


class RebalanceRun(ApiObject):
    """A run that makes moves until none is left."""

    started_at: Timestamp = always(Timestamp(""))
    by: str = always("")
    """The user who started it, or empty if the leader did after the return of a node."""
    moved: int = always(0)
    """Moves that were begun."""
    skipped: tuple[ServiceId, ...] = always(())
    """Services whose move failed.  They stay where they are during this run."""
    waiting: str = always("")
    """Reason why no move is begun now."""
    stopping: bool = always(False)
    """Whether a user has stopped it.  It ends with the moves that have begun."""


class Rebalancing(ApiObject):
    """The record, and a part of the response of ``/skep/rebalance``."""

    after_return_s: int = always(0)
    """Seconds after the return of a node until a run is started, or 0 for never."""
    run: RebalanceRun | None = None
    last: str = always("")
    """Result of the last run."""


class RebalancePlan(ApiObject):
    """Response of ``/skep/rebalance``."""

    moves: tuple[PlannedMove, ...] = always(())
    rebalancing: Rebalancing = always(Rebalancing())
    held: str = always("")
    """The freeze or window that holds the moves of the whole cluster."""


def rebalancing_in(view: View) -> Rebalancing:
    """Return the record.  One that cannot be read counts as missing."""
    payload = view.lookup(Payload, REBALANCE_ID)
    try:
        return msgspec.json.decode(payload.data, type=Rebalancing) if payload is not None else Rebalancing()
    except msgspec.DecodeError:
        return Rebalancing()


def _write(tx: Transaction, changed: Rebalancing) -> None:
    present = tx.rely_on(Payload, REBALANCE_ID)
    data = msgspec.json.encode(changed)
    if present is None or present.data != data:
        tx.put(Payload(id=REBALANCE_ID, data=data))


def set_after_return(tx: Transaction, seconds: int) -> None:
    """Set the wait after the return of a node, or 0 for no automatic runs.  Raises: InvalidArgument."""
    if seconds and not AFTER_RETURN_S_MIN <= seconds <= AFTER_RETURN_S_MAX:
        raise InvalidArgument(
            f"the wait after a return has to be between {AFTER_RETURN_S_MIN} seconds and 24 hours, or 0 for none"
        )
    _write(tx, replace(rebalancing_in(tx), after_return_s=seconds))


def start_run(tx: Transaction, by: str, now: Timestamp) -> Rebalancing:
    """Start a run.

    Raises:
        FailedPrecondition: A run is in progress, or the cluster is frozen or outside of its window.
    """
    present = rebalancing_in(tx)
    if present.run is not None:
        raise FailedPrecondition("a rebalance is in progress: wait, or stop it with skep rebalance --stop")
    if held := held_by(tx):
        raise FailedPrecondition(f"{held}: no task is moved until then")
    changed = replace(present, run=RebalanceRun(started_at=now, by=by), last="")
    _write(tx, changed)
    return changed


def stop_run(tx: Transaction) -> None:
    """Stop the run.  Moves that have begun are completed.  Raises: NotFound: there is none."""
    present = rebalancing_in(tx)
    if present.run is None:
        raise NotFound("no rebalance is in progress")
    _write(tx, replace(present, run=replace(present.run, stopping=True, waiting="")))


def end_run(tx: Transaction, started_at: Timestamp) -> None:
    """End the run that started at this time, because no move is left."""
    present = rebalancing_in(tx)
    if (run := present.run) is None or run.started_at != started_at:
        return
    failed = (
        f", without {counted(len(run.skipped), 'service')} whose tasks did not start" if run.skipped else ""
    )
    how = "stopped after " if run.stopping else ""
    _write(tx, replace(present, run=None, last=f"{how}{counted(run.moved, 'move')}{failed}"))


def note_waiting(tx: Transaction, reason: str) -> None:
    """Record why the run waits, or that it continues."""
    present = rebalancing_in(tx)
    if present.run is not None:
        _write(tx, replace(present, run=replace(present.run, waiting=reason)))


def begin_move(tx: Transaction, move: PlannedMove, now: Timestamp) -> bool:
    """Mark the task, so that the orchestrator starts its successor.  Return whether it was marked.

    Nothing is written if the run was stopped, a freeze has begun, or the task or a node has changed since the plan.
    """
    present, task = rebalancing_in(tx), tx.rely_on(Task, move.task_id, HEAD, "status")
    service = tx.rely_on(Service, move.service_id, HEAD)
    if present.run is None or present.run.stopping:
        return False
    if task is None or service is None or service.removed_at is not None:
        return False
    is_unchanged = (
        task.status.state is TaskState.RUNNING
        and task.desired_state is TaskState.RUNNING
        and task.node_id == move.source
        and task.spec_version == service.spec_version
        and task.relocation is None
    )
    if not is_unchanged or not _takes_part(tx, move) or is_held_at_commit(tx, stack_of_service(service)):
        return False
    tx.put(replace(task, relocation=Relocation(target=move.target, at=now)))
    _write(tx, replace(present, run=replace(present.run, moved=present.run.moved + 1, waiting="")))
    return True


def _takes_part(tx: Transaction, move: PlannedMove) -> bool:
    """Return whether the target takes tasks, and no node of the move is about to restart."""
    for swarm in tx.find(Swarm):
        tx.rely_on(Swarm, swarm.id, HEAD)
    target = tx.rely_on(Node, move.target, HEAD, "status")
    is_locked = not locked_nodes(tx).isdisjoint((move.source, move.target))
    return target is not None and takes_tasks(target) and not is_locked


def give_up(tx: Transaction, task: Task) -> None:
    """Let the task stay on its node, and its service for the rest of the run.  Its successor is stopped."""
    present, current = rebalancing_in(tx), tx.lookup(Task, task.id)
    if current is not None and current.relocation is not None:
        tx.put(replace(current, relocation=None))
    if (run := present.run) is not None and task.service_id not in run.skipped:
        skipped = (*run.skipped, task.service_id)
        _write(tx, replace(present, run=replace(run, skipped=skipped)))


def is_stuck(task: Task, view: View, seconds: float) -> bool:
    """Return whether the move of ``task`` cannot succeed, or takes too long.

    Args:
        seconds: Time for which this leader has seen the move, without times in which a freeze held it back.
    """
    assert task.relocation is not None, "it moves"
    target = view.lookup(Node, task.relocation.target)
    if target is None or not takes_tasks(target):
        return True
    slot = view.find(Task, slot=f"{task.service_id}/{task.slot}")
    if any(one.created_at > task.relocation.at and _has_failed(one) for one in slot):
        return True
    return seconds > MOVE_S


def _has_failed(task: Task) -> bool:
    return task.has_failed or task.status.state is TaskState.REJECTED
