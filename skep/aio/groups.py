"""Unwraps the errors of task groups from their ExceptionGroup."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


@asynccontextmanager
async def errors_as_they_are() -> AsyncIterator[None]:
    """Wrap a ``TaskGroup`` so that a single error is raised without a group.  Several errors are raised as a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise


@contextmanager
def first_alone(kind: type[Exception] | tuple[type[Exception], ...]) -> Iterator[None]:
    """Wrap a ``TaskGroup`` so that the first error is raised, with the group as its cause, if all errors are of
    ``kind``.

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
