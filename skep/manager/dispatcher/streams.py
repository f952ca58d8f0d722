"""Streams of assignments: everything once, then differences, each relative to the message before."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from skep.manager.dispatcher.assignments import difference, everything
from skep.manager.dispatcher.encoding import encoded
from skep.manager.dispatcher.sessions import Sessions
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.service import Handler, server_stream


class AssignmentStreams:
    """Assignments for nodes with a session here.  Engines get SwarmKit's messages, skep nodes the revision as well."""

    def __init__(self, store: Store, sessions: Sessions) -> None:
        self._store = store
        self._sessions = sessions

    def services(self) -> Sequence[Handler]:
        """What to hand to ``wire.server.serve``."""
        return (
            server_stream(methods.ASSIGNMENTS, self._assignments),
            server_stream(methods.REVISED_ASSIGNMENTS, self._revised_assignments),
        )

    async def _assignments(
        self, request: pb.AssignmentsRequest, caller: Caller
    ) -> AsyncIterator[pb.AssignmentsMessage]:
        async with aclosing(self._messages(request, caller)) as messages:
            async for _, message in messages:
                yield message
                del message  # not kept until the next one

    async def _revised_assignments(
        self, request: pb.AssignmentsRequest, caller: Caller
    ) -> AsyncIterator[skep.RevisedAssignments]:
        async with aclosing(self._messages(request, caller)) as messages:
            async for revision, message in messages:
                yield skep.RevisedAssignments(
                    incarnation=self._store.incarnation, revision=revision, message=message
                )
                del message

    async def _messages(
        self, request: pb.AssignmentsRequest, caller: Caller
    ) -> AsyncGenerator[tuple[int, pb.AssignmentsMessage], None]:
        """The messages of one stream, with their revisions."""
        session = self._sessions.require(caller.node_id, request.session_id)
        with session.assignment_signal() as signal:
            change, sent = everything(self._store.view(), session.node_id)
            number = 1
            yield change.revision, await encoded(change, "", str(number))
            del change
            while True:
                changed = await signal.wait()
                session.require_open()
                update, sent = difference(self._store.view(), session.node_id, sent, changed)
                if update is None:
                    continue
                applies_to, number = str(number), number + 1
                yield update.revision, await encoded(update, applies_to, str(number))
                del update
