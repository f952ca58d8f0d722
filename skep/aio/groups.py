"""Raises errors of task groups as themselves instead of in an ExceptionGroup."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


@asynccontextmanager
async def errors_as_they_are() -> AsyncIterator[None]:
    """Wrap a ``TaskGroup``: a single error leaves the block as itself, several as a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise


@contextmanager
def first_alone(kind: type[Exception]) -> Iterator[None]:
    """Wrap a ``TaskGroup``: if all errors are of ``kind``, the first leaves the block, caused by their group.

    Does not use ``except*``: Python before 3.11.4 wraps errors raised in it in a group again.
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
