"""One write for what is written in one turn of the event loop."""

import asyncio
from typing import Any

from skep.rpc.coalescing import COALESCED_BYTES_MAX, CoalescingTransport


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
