"""Task groups behind context managers, whose users should see an error and not a group of one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def errors_as_they_are() -> AsyncIterator[None]:
    """Around a ``TaskGroup``: a single error leaves the block as itself; several stay a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise
