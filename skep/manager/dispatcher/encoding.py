"""Assignments as messages, encoded in batches: a node with a thousand tasks does not block the event loop."""

import asyncio

import msgspec
import structlog

from skep.errors import SkepError
from skep.model.assignment import AssignmentSet
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.assignments import changes_to_pb

log = structlog.get_logger(__name__)

TASKS_AT_ONCE = 50
"""Tasks encoded before the event loop gets control: about 5 ms."""


async def encoded(change: AssignmentSet, applies_to: str, results_in: str) -> pb.AssignmentsMessage:
    """``change`` as a message, from the state named ``applies_to`` to that named ``results_in``."""
    kind = pb.AssignmentsMessage.COMPLETE if change.complete else pb.AssignmentsMessage.INCREMENTAL
    message = pb.AssignmentsMessage(type=kind, applies_to=applies_to, results_in=results_in)
    for piece in _pieces(change):
        if message.changes:
            await asyncio.sleep(0)
        message.changes.extend(_changes(piece))
    return message


def _changes(piece: AssignmentSet) -> list[pb.AssignmentChange]:
    """Encode; a task that cannot be encoded is left out, so that it does not keep the others from their node."""
    try:
        return changes_to_pb(piece)
    except SkepError:
        changes = changes_to_pb(msgspec.structs.replace(piece, tasks=()))
    for task in piece.tasks:
        try:
            changes += changes_to_pb(
                AssignmentSet(complete=False, tasks=(task,), registry_auths=piece.registry_auths)
            )
        except SkepError as error:
            log.error("task cannot be assigned", task=task.task.id, error=str(error))
    return changes


def _pieces(change: AssignmentSet) -> list[AssignmentSet]:
    """The change in several, with at most ``TASKS_AT_ONCE`` tasks each."""
    if len(change.tasks) <= TASKS_AT_ONCE:
        return [change]
    rest = msgspec.structs.replace(change, tasks=())
    return [
        rest,
        *(
            AssignmentSet(
                complete=change.complete,
                tasks=change.tasks[first : first + TASKS_AT_ONCE],
                registry_auths=change.registry_auths,
            )
            for first in range(0, len(change.tasks), TASKS_AT_ONCE)
        ),
    ]
