"""Streams of assignments: to each node everything once, then the differences, each applying to the one before."""

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
    """What nodes with a session here are told to run.  Engines hear SwarmKit's messages, ours the revision as well."""

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
                del message  # not held until the next one

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
        """The chain of one stream, with the revision of each message."""
        session = self._sessions.require(caller.node_id, request.session_id)
        with session.line() as line:
            change, told = everything(self._store.view(), session.node_id)
            number = 1
            yield change.revision, await encoded(change, "", str(number))
            del change
            while True:
                changed = await line.wait()
                session.require_open()
                news, told = difference(self._store.view(), session.node_id, told, changed)
                if news is None:
                    continue
                applies_to, number = str(number), number + 1
                yield news.revision, await encoded(news, applies_to, str(number))
                del news
