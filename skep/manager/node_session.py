"""What a part of the manager with a stream to each node needs of the node's session."""

from contextlib import AbstractContextManager
from typing import Protocol


class StreamSignal(Protocol):
    """Wakes one stream."""

    def wake(self) -> None: ...

    async def wait(self) -> object: ...


class NodeSession(Protocol):
    """A node's session with this manager."""

    @property
    def id(self) -> str: ...

    def require_open(self) -> None:
        """Raises: the error that ended the session."""

    def signal(self) -> AbstractContextManager[StreamSignal]:
        """A signal that is also set when the session ends."""
