"""What a build holds of its client, its files and its ssh agent, while something else ends."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.contexts import ContextStore
from skep.engine.buildkit.protocol.filesync import SyncSelection, receive
from skep.engine.buildkit.provider import ClientProvider
from skep.engine.buildkit.tree import Contents, TreeLimits
from skep.engine.images.archives.workers import ImageLimits

_STAYS_S = 0.3
_LIMIT_S = 60.0


class Client:
    """The calls of a session whose client sends ``packets``, all of which have come."""

    silent_s = None

    def __init__(self, packets: Sequence[pb.Packet] = ()) -> None:
        self._packets = [packet.SerializeToString() for packet in packets]

    async def call(self, method: str, request: Message, response: type[Message]) -> Message:
        return response()

    @asynccontextmanager
    async def stream(
        self, method: str, metadata: object, *, silent_s: float | None
    ) -> AsyncIterator["Client"]:
        yield self

    async def send(self, message: Message) -> None:
        pass

    async def receive(self) -> bytes | None:
        if not self._packets:
            await asyncio.Event().wait()
        return self._packets.pop(0)

    @property
    def has_more(self) -> bool:
        return bool(self._packets)


def received(client: Any, root: Path) -> "asyncio.Task[object]":
    limits = TreeLimits(bytes=1 << 20)
    return asyncio.ensure_future(
        receive(client, SyncSelection(name="context"), root, limits, room_bytes=1 << 20)
    )


async def test_a_cancelled_transfer_closes_its_files_after_the_last_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, order = threading.Event(), threading.Event(), list[str]()
    write, close = Contents.write, Contents.close

    def slow_write(contents: Contents, number: int, data: bytes) -> bool:
        begun.set()
        may_end.wait(_LIMIT_S)
        has_ended = write(contents, number, data)
        order.append("written")
        return has_ended

    def noted_close(contents: Contents) -> None:
        order.append("closed")
        close(contents)

    monkeypatch.setattr(Contents, "write", slow_write)
    monkeypatch.setattr(Contents, "close", noted_close)
    packets = [
        pb.Packet(type=pb.Packet.STAT, stat=pb.Stat(path=b"file", mode=0o644, size=3)),
        pb.Packet(type=pb.Packet.STAT),
        pb.Packet(type=pb.Packet.DATA, id=0, data=b"abc"),
    ]
    transfer = received(Client(packets), tmp_path)
    assert await asyncio.to_thread(begun.wait, _LIMIT_S)
    transfer.cancel()
    await asyncio.wait({transfer}, timeout=_STAYS_S)
    may_end.set()
    await asyncio.wait({transfer}, timeout=_LIMIT_S)
    assert transfer.cancelled()
    assert order == ["written", "closed"]


async def test_a_long_listing_lets_other_tasks_run(tmp_path: Path) -> None:
    packets = [
        pb.Packet(type=pb.Packet.STAT, stat=pb.Stat(path=os.fsencode(f"{number:05}"), mode=0o644))
        for number in range(3000)
    ]
    client = Client([*packets, pb.Packet(type=pb.Packet.STAT)])
    transfer = received(client, tmp_path)
    turns = 0
    while client.has_more and not transfer.done():
        turns += 1
        await asyncio.sleep(0)
    transfer.cancel()
    await asyncio.wait({transfer}, timeout=_LIMIT_S)
    assert turns > 10


async def test_the_socket_of_an_agent_outlives_the_contexts_of_other_builds(tmp_path: Path) -> None:
    contexts = ContextStore(tmp_path / "contexts", ImageLimits())
    client: Any = Client()
    async with ClientProvider(client, contexts.scratch).ssh("default") as socket:
        await contexts.prune()
        assert socket is not None
        assert socket.is_socket()
    assert not list((tmp_path / "contexts").iterdir())
