"""Contexts on standard input of docker 20.10: one request uploads the archive, another one builds it.

The client sends both at once, with one id.  Newer clients upload through their session (``remote_contexts``).

Source: moby 20.10, builder/builder-next/builder.go (buildJob.SetUpload, WaitUpload); docker/cli 20.10,
cli/command/image/build_buildkit.go.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

from skep.errors import AlreadyExists, InvalidArgument, ResourceExhausted, SkepError, Unavailable

T = TypeVar("T")

PREFIX = "upload-request"
"""Value of ``remote`` of a build with an upload, and the start of the upload's ``buildid``."""
UPLOADS_MAX = 64
"""Maximum number of uploads and builds that wait for each other."""
_WAIT_S = 15.0
"""Seconds to wait for the second of the two requests.  The client sends both at once."""

OpenUpload = Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Opens the upload of a build.  Raises: InvalidArgument: it does not arrive."""


class _Meeting:
    """An upload and its build."""

    def __init__(self) -> None:
        self.pieces: asyncio.Future[AsyncIterator[bytes]] = asyncio.get_running_loop().create_future()
        self.is_taken = asyncio.Event()
        self.is_over = asyncio.Event()


class Uploads:
    """Uploads by the ids of their builds."""

    def __init__(self, wait_s: float = _WAIT_S) -> None:
        self._wait_s = wait_s
        self.meetings: dict[str, _Meeting] = {}

    async def offer(self, id: str, pieces: AsyncIterator[bytes]) -> None:
        """Provide an archive to the build ``id`` and wait until the build has read it.

        Raises: Unavailable: no build takes it; AlreadyExists, ResourceExhausted.
        """
        meeting = self._meeting(id)
        if meeting.pieces.done():
            raise AlreadyExists(f"build {id} has a context already")
        meeting.pieces.set_result(pieces)
        try:
            await _within(
                meeting.is_taken.wait(), Unavailable(f"no build takes the context of {id}"), self._wait_s
            )
            await meeting.is_over.wait()
        finally:
            self.meetings.pop(id, None)

    @asynccontextmanager
    async def take(self, id: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Read the archive of the build ``id``.  Raises: InvalidArgument: it does not arrive; ResourceExhausted."""
        meeting = self._meeting(id)
        try:
            missing = InvalidArgument(f"the context of build {id} was not uploaded")
            # The deadline ends the wait, not the upload, which may still arrive for a repeated request.
            pieces = await _within(asyncio.shield(meeting.pieces), missing, self._wait_s)
            meeting.is_taken.set()
            yield pieces
        finally:
            self.end(id)

    def end(self, id: str) -> None:
        """Let the upload of a build end, whether or not the build has read it."""
        if meeting := self.meetings.pop(id, None):
            meeting.is_taken.set()
            meeting.is_over.set()

    def _meeting(self, id: str) -> _Meeting:
        if id not in self.meetings:
            if len(self.meetings) >= UPLOADS_MAX:
                raise ResourceExhausted(f"{UPLOADS_MAX} contexts are uploaded already")
            self.meetings[id] = _Meeting()
        return self.meetings[id]


async def _within(work: Awaitable[T], refusal: SkepError, wait_s: float) -> T:
    """Return the result of ``work``.  Raises: ``refusal``: it takes too long."""
    try:
        async with asyncio.timeout(wait_s):
            return await work
    except TimeoutError as error:
        raise refusal from error
