"""What a part of the manager that has a stream to each node sees of the node's session."""

from contextlib import AbstractContextManager
from typing import Protocol


class Line(Protocol):
    """What wakes one stream."""

    def wake(self) -> None: ...

    async def wait(self) -> object: ...


class NodeSession(Protocol):
    """A node's session with this manager."""

    @property
    def id(self) -> str: ...

    def require_open(self) -> None:
        """Raises: what ended the session."""

    def aside(self) -> AbstractContextManager[Line]:
        """A line that the session's end wakes."""
