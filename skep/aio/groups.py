"""Errors of task groups, raised as themselves instead of in an ExceptionGroup."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


@asynccontextmanager
async def errors_as_they_are() -> AsyncIterator[None]:
    """Around a ``TaskGroup``: a single error leaves the block as itself; several stay a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise


@contextmanager
def first_alone(kind: type[Exception]) -> Iterator[None]:
    """Around a ``TaskGroup``: of errors that are all of ``kind``, the first leaves the block, caused by their group.

    Not with ``except*``: Python before 3.11.4 wraps what it raises in a group again.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        if group.split(kind)[1] is not None:
            raise
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group
