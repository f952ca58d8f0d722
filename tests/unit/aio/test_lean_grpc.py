"""What grpclib's connections consist of behaves as what it replaces."""

import asyncio
from typing import Any

import pytest

from skep.aio.lean_grpc import COALESCED_BYTES_MAX, Buffer, CoalescingTransport, Event


class Recorder(asyncio.Transport):
    """A transport that remembers what was done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.done.append(bytes(data))

    def close(self) -> None:
        self.done.append("close")

    def abort(self) -> None:
        self.done.append("abort")


async def test_what_is_written_in_one_turn_of_the_loop_is_one_write() -> None:
    recorder = Recorder()
    transport = CoalescingTransport(recorder)
    for piece in (b"headers", b"", b" message", b" trailers"):
        transport.write(piece)
    assert recorder.done == []
    await asyncio.sleep(0)
    assert recorder.done == [b"headers message trailers"]


async def test_much_is_not_held_back_until_the_turn_ends() -> None:
    recorder = Recorder()
    transport = CoalescingTransport(recorder)
    transport.write(b"x" * COALESCED_BYTES_MAX)
    assert [len(data) for data in recorder.done] == [COALESCED_BYTES_MAX]


async def test_the_last_word_is_written_before_the_end() -> None:
    recorder = Recorder()
    transport = CoalescingTransport(recorder)
    transport.write(b"goodbye")
    transport.close()
    await asyncio.sleep(0)
    assert recorder.done == [b"goodbye", "close"]


async def test_nothing_is_written_after_an_abort() -> None:
    recorder = Recorder()
    transport = CoalescingTransport(recorder)
    transport.write(b"lost")
    transport.abort()
    await asyncio.sleep(0)
    assert recorder.done == ["abort"]


async def test_an_event_wakes_all_who_wait_and_is_left_by_one_who_gave_up() -> None:
    event = Event()
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(event.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        event.set()
    assert [task.cancelled() for task in waiting] == [True, False, False]
    assert event.is_set()
    event.clear()
    assert not event.is_set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await event.wait()


async def test_a_read_takes_from_several_pieces_and_leaves_the_rest() -> None:
    acknowledged: list[int] = []
    buffer = Buffer(acknowledged.append)
    buffer.add(b"abc", 3)
    buffer.add(b"", 0)
    buffer.add(b"defg", 14)
    buffer.add(b"h", 1)
    assert await buffer.read(5) == b"abcde"
    assert acknowledged == [3, 14], "padding counts, and what is not read yet does not"
    buffer.eof()
    assert await buffer.read(3) == b"fgh"
    assert await buffer.read(1) == b""


async def test_a_read_waits_for_what_is_missing() -> None:
    buffer = Buffer(lambda size: None)
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(buffer.read(4))
        for piece in (b"ab", b"cd"):
            await asyncio.sleep(0)
            assert not reading.done()
            buffer.add(piece, 2)
    assert reading.result() == b"abcd"


async def test_a_message_that_ends_early_is_no_message() -> None:
    buffer = Buffer(lambda size: None)
    buffer.add(b"ab", 2)
    buffer.eof()
    with pytest.raises(AssertionError):
        await buffer.read(3)


async def test_what_nobody_read_is_given_back_once() -> None:
    acknowledged: list[int] = []
    buffer = Buffer(acknowledged.append)
    buffer.add(b"ab", 2)
    buffer.add(b"cd", 2)
    assert await buffer.read(1) == b"a"
    assert (acknowledged, buffer.unacked_size(), buffer.unacked_size()) == ([2], 2, 0)
