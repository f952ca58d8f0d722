"""``attach`` by WebSocket on real containers, and what a client may do there that does not follow the protocol."""

import asyncio
from contextlib import suppress

import aiohttp
import pytest
from aiohttp import WSMsgType

from skep.engine.api.streams import hijack
from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import PlainOptions
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.api_lab import Api

TALK = ("sh", "-c", 'echo up; while read line; do echo "got $line"; [ "$line" = end ] && exit 3; done')
ALL = "logs=1&stream=1&stdin=1&stdout=1&stderr=1"
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


async def heard(web: aiohttp.ClientWebSocketResponse, wanted: bytes) -> set[WSMsgType]:
    """Read until ``wanted`` has come; gives the kinds of the messages."""
    kinds, content = set(), b""
    while wanted not in content:
        message = await asyncio.wait_for(web.receive(), 10)
        assert message.type in (WSMsgType.TEXT, WSMsgType.BINARY), (message, content)
        kinds.add(message.type)
        content += message.data if isinstance(message.data, bytes) else message.data.encode()
    return kinds


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize(("version", "kind"), [("1.41", WSMsgType.BINARY), ("1.27", WSMsgType.TEXT)])
async def test_both_directions_until_the_container_ends(
    api: Api, run: Runner, version: str, kind: WSMsgType, *, tty: bool
) -> None:
    container = await run.start(*TALK, tty=tty, open_stdin=True, plain=PlainOptions())
    async with api.websocket(f"/v{version}/containers/{container.id}/attach/ws?{ALL}") as web:
        assert await heard(web, b"up") == {kind}, "from its log"
        await web.send_bytes(b"one\n")
        assert await heard(web, b"got one") == {kind}
        await web.send_str("end\n")
        await heard(web, b"got end")
        while (message := await asyncio.wait_for(web.receive(), 10)).type is kind:
            pass
        assert (message.type, web.close_code) == (WSMsgType.CLOSE, 1000)
    assert (await run.engine.wait(container.id)).exit_code == 3


async def test_output_between_the_log_and_the_stream_is_not_lost(
    api: Api, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await run.start("sh", "-c", "echo up; read x; echo late; read x", open_stdin=True)
    attach = run.engine.attach

    async def attach_late(word: str) -> Attachment:
        """The process writes just before the client is attached."""
        first = await attach(word)
        await first.write(b"\n")
        while (piece := await first.read()) is not None and b"late" not in piece[1]:
            pass
        first.close()
        return await attach(word)

    monkeypatch.setattr(run.engine, "attach", attach_late)
    async with api.websocket(f"/v1.41/containers/{container.id}/attach/ws?{ALL}") as web:
        await heard(web, b"late")


async def test_streams_are_chosen_by_newer_clients(api: Api, run: Runner) -> None:
    container = await run.start("sh", "-c", "read x; echo out; echo bad >&2", open_stdin=True)
    path = f"/containers/{container.id}/attach/ws?stream=1"
    async with api.websocket(f"/v1.42{path}&stderr=1") as errors, api.websocket(f"/v1.41{path}") as all:
        await errors.send_bytes(b"not for it\n")
        await all.send_bytes(b"\n")
        assert (await asyncio.wait_for(errors.receive(), 10)).data == b"bad\n"
        await heard(all, b"bad\n")


async def test_the_keys_detach_and_the_container_runs_on(api: Api, run: Runner) -> None:
    container = await run.start("cat", tty=True, open_stdin=True)
    path = f"/v1.41/containers/{container.id}/attach/ws?stream=1&detachKeys=ctrl-x,y"
    async with api.websocket(path) as web:
        await web.send_bytes(b"\x10\x11\x18")
        await web.send_bytes(b"y")
        while (await asyncio.wait_for(web.receive(), 10)).type is not WSMsgType.CLOSE:
            pass
    await eventually(lambda: run.engine.events.recent(0)[-1].action == "detach", "the event")
    assert run.engine.get(container.id).is_running


async def test_what_is_no_handshake_is_refused(api: Api, run: Runner) -> None:
    container = await run.start("sleep", "100")
    path = f"/containers/{container.id}/attach/ws?stream=1"
    status, refused = await api.ask("GET", path)
    assert (status, refused["message"][:22]) == (400, "not websocket protocol")
    assert (await api.ask("POST", path))[0] == 404
    for id, status in (("nosuch", 404), (container.id, 409)):
        if status == 409:
            await run.engine.pause(container.id)
        with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
            async with api.websocket(f"/containers/{id}/attach/ws?stream=1"):
                pass
        assert raised.value.status == status
    await run.engine.unpause(container.id)


async def test_a_client_that_never_reads_is_cut_off_and_little_is_kept_for_it(
    api: Api, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skep.engine.api.streams.websocket.DRAIN_S", 1.0)
    container = await run.start("sh", "-c", "sleep 0.2; exec yes")
    reader, writer = await asyncio.open_unix_connection(api.socket, limit=1)
    head = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items())
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    path = f"/v1.41/containers/{container.id}/attach/ws?stream=1"
    writer.write(f"GET {path} HTTP/1.1\r\nHost: d\r\n{head}\r\n".encode())
    await eventually(lambda: run.engine.events.recent(0)[-1].action == "detach", "it is cut off")
    assert hijack.DRAIN_S == 60
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    taken = 0
    try:
        while data := await asyncio.wait_for(reader.read(1 << 16), 10):
            taken += len(data)
    except ConnectionError:
        pass
    assert taken < 2 << 20
    writer.close()
    assert run.engine.get(container.id).is_running


async def test_too_long_a_message_ends_the_connection_and_not_the_container(api: Api, run: Runner) -> None:
    container = await run.start("cat", open_stdin=True)
    async with api.websocket(f"/containers/{container.id}/attach/ws?stream=1&stdin=1&stdout=1") as web:
        with suppress(ConnectionError):
            await web.send_bytes(bytes(1 << 21))
        message = await asyncio.wait_for(web.receive(), 10)
        assert message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR)
    assert run.engine.get(container.id).is_running
