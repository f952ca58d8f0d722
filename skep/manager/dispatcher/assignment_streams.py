"""Assignment streams: everything once, then differences, each relative to the message before."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing

import msgspec
import structlog

from skep.errors import SkepError
from skep.manager.dispatcher.assignments import difference, everything
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.manager.dispatcher.state import SentObjects
from skep.model.assignment import AssignmentSet
from skep.model.task import Task, Trust
from skep.model.values.ids import TaskId
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.assignments import changes_to_pb
from skep.wire.service import Handler, server_stream

log = structlog.get_logger(__name__)

TASKS_AT_ONCE = 50
"""Tasks encoded before the event loop gets control.  They take about 5 ms."""


class AssignmentStreams:
    """Assignments for nodes with a session here.  Engines get SwarmKit's messages, skep nodes also the revision."""

    def __init__(self, store: Store, sessions: Sessions, sent: SentObjects) -> None:
        self._store = store
        self._volumes, self._door = sent
        self._sessions = sessions

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            server_stream(methods.ASSIGNMENTS, self._assignments),
            server_stream(methods.REVISED_ASSIGNMENTS, self._revised_assignments),
        )

    async def _assignments(
        self, request: pb.AssignmentsRequest, caller: Caller
    ) -> AsyncIterator[pb.AssignmentsMessage]:
        async with aclosing(self._messages(request, caller)) as messages:
            async for _, _, message in messages:
                yield message
                del message  # not kept until the next one

    async def _revised_assignments(
        self, request: pb.AssignmentsRequest, caller: Caller
    ) -> AsyncIterator[skep.RevisedAssignments]:
        async with aclosing(self._messages(request, caller)) as messages:
            async for revision, trusted, message in messages:
                yield skep.RevisedAssignments(
                    incarnation=self._store.incarnation,
                    revision=revision,
                    message=message,
                    trusted_logs=[id for id, trust in trusted.items() if trust.logs],
                    trusted_logins=[id for id, trust in trusted.items() if trust.logins],
                    decides_trust=True,
                )
                del message

    async def _messages(
        self, request: pb.AssignmentsRequest, caller: Caller
    ) -> AsyncGenerator[tuple[int, Mapping[TaskId, Trust], pb.AssignmentsMessage], None]:
        """Yield the messages of one stream, with their revisions and the trust in their tasks."""
        session = self._sessions.require(caller.node_id, request.session_id)
        with session.assignment_signal() as signal:
            change, sent = everything(
                self._store.view(), session.node_id, self._volumes.on, self._door.present
            )
            number = 1
            yield change.revision, _trust_in(change), await encode_assignments(change, "", str(number))
            del change
            while True:
                changed = await signal.wait()
                session.require_open()
                view = self._store.view()
                if changed is None:  # includes deleted tasks, whose only trace is the sent state
                    here = (task.id for task in view.find(Task, node_id=session.node_id))
                    changed = {*sent.tasks, *here}
                update, sent = difference(
                    view, session.node_id, sent, changed, self._volumes.on, self._door.present
                )
                del view
                if update is None:
                    continue
                applies_to, number = str(number), number + 1
                yield (
                    update.revision,
                    _trust_in(update),
                    await encode_assignments(update, applies_to, str(number)),
                )
                del update


def _trust_in(change: AssignmentSet) -> Mapping[TaskId, Trust]:
    return {one.task.id: one.trust for one in change.tasks if one.trust != Trust()}


# -- messages, encoded in batches: a node with a thousand tasks does not block the event loop ------------------------


async def encode_assignments(
    change: AssignmentSet, applies_to: str, results_in: str
) -> pb.AssignmentsMessage:
    """Encode ``change`` as a message that leads from state ``applies_to`` to state ``results_in``."""
    kind = pb.AssignmentsMessage.COMPLETE if change.complete else pb.AssignmentsMessage.INCREMENTAL
    message = pb.AssignmentsMessage(type=kind, applies_to=applies_to, results_in=results_in)
    for piece in _pieces(change):
        if message.changes:
            await asyncio.sleep(0)
        message.changes.extend(_changes(piece))
    return message


def _changes(piece: AssignmentSet) -> list[pb.AssignmentChange]:
    """Encode a piece without tasks that cannot be encoded, so that they do not keep the others from their node."""
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
    """Split the change into pieces with at most ``TASKS_AT_ONCE`` tasks each."""
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
