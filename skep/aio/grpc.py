"""What grpclib leaves behind in its caller's task when a connection breaks, and how that is put right.

Both are shown by ``tests/unit/aio/test_grpc.py``; seen with grpclib 0.4.9.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def breaks_of_grpclib() -> Iterator[None]:
    """Around calls of grpclib: a broken connection leaves the block as what it is, and nothing but that.

    grpclib interrupts a waiting call by cancelling its task, raises another error in place of the cancellation, and
    forgets to take the cancellation itself back: every later timeout of that task would end as a cancellation.

    Raises: ConnectionResetError: the connection broke between its opening and its first use, which grpclib notices
        by an attribute that it has deleted.
    """
    task = asyncio.current_task()
    cancelled_before = task.cancelling() if task is not None else 0
    try:
        yield
    except Exception as error:
        while task is not None and task.cancelling() > cancelled_before:
            task.uncancel()
        if isinstance(error, AttributeError) and type(error.obj).__module__.startswith("grpclib"):
            raise ConnectionResetError("the connection broke as soon as it was open") from error
        raise
