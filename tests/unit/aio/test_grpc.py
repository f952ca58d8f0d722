"""Broken connections of grpclib, as a task of ours sees them."""

import asyncio

import pytest
from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import Connection
from grpclib.utils import Wrapper

from skep.aio.grpc import breaks_of_grpclib


async def interrupted(wrapper: Wrapper) -> None:
    """A call that waits for an answer when its connection is lost."""
    asyncio.get_running_loop().call_soon(wrapper.cancel, StreamTerminatedError("lost"))
    with wrapper:
        await asyncio.Event().wait()


async def test_a_lost_connection_leaves_no_cancellation_behind() -> None:
    with pytest.raises(StreamTerminatedError), breaks_of_grpclib():
        await interrupted(Wrapper())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_without_it_grpclib_leaves_one() -> None:
    """When this fails, grpclib has learned to take its cancellation back, and ``breaks_of_grpclib`` may go."""
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(StreamTerminatedError):
        await interrupted(Wrapper())
    assert task.cancelling() == 1
    task.uncancel()


async def test_a_connection_that_breaks_as_soon_as_it_is_open_is_a_lost_one() -> None:
    connection = Connection.__new__(Connection)  # grpclib deletes the attributes of one that is closed
    with pytest.raises(ConnectionResetError), breaks_of_grpclib():
        connection.write_ready.set()


async def test_a_missing_attribute_of_ours_stays_a_bug() -> None:
    with pytest.raises(AttributeError), breaks_of_grpclib():
        _ = object().missing  # type: ignore[attr-defined]


async def test_a_true_cancellation_passes() -> None:
    async def waiting() -> None:
        with breaks_of_grpclib():
            await asyncio.Event().wait()

    task = asyncio.ensure_future(waiting())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
