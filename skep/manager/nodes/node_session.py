"""The node session as seen by a part of the manager that has a stream to each node."""

from contextlib import AbstractContextManager
from typing import Protocol


class StreamWaker(Protocol):
    """Wakes one stream."""

    def wake(self) -> None: ...

    async def wait(self) -> object: ...


class NodeSession(Protocol):
    """A node's session with this manager."""

    @property
    def id(self) -> str: ...

    def require_open(self) -> None:
        """Raise the error that ended the session, if it has ended."""

    def signal(self) -> AbstractContextManager[StreamWaker]:
        """Return a signal that is also set when the session ends."""
