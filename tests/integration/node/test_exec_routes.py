"""``docker exec`` over plain sockets: both directions of a connection that was taken over."""

import asyncio
from typing import Any

import pytest

from tests.integration.node.conftest import Runner
from tests.support.engine.api_lab import Api


async def an_exec(api: Api, id: str, *command: str, **config: Any) -> str:
    requested = {"AttachStdout": True, "AttachStderr": True, "Cmd": list(command), **config}
    status, response = await api.ask("POST", f"/containers/{id}/exec", requested)
    assert status == 201
    return str(response["Id"])


async def test_output_continues_after_the_end_of_the_input(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    id = await an_exec(
        api, container.id, "sh", "-c", "cat; echo after; echo bad >&2; exit 3", AttachStdin=True
    )
    raw = await api.hijack(f"/exec/{id}/start", {"Detach": False, "Tty": False})
    assert "Content-Type: application/vnd.docker.raw-stream" in raw.head
    raw.writer.write(b"input\n")
    raw.writer.write_eof()
    frames = await asyncio.wait_for(raw.frames(), 10)
    assert b"".join(data for stream, data in frames if stream == 1) == b"input\nafter\n"
    assert b"".join(data for stream, data in frames if stream == 2) == b"bad\n"
    _, found = await api.ask("GET", f"/exec/{id}/json")
    assert (found["ExitCode"], found["Running"]) == (3, False)
    raw.writer.close()


@pytest.mark.parametrize("is_out", [True, False])
@pytest.mark.parametrize("is_error", [True, False])
async def test_a_client_gets_the_streams_that_it_has_attached_and_the_exit_code(
    api: Api, run: Runner, *, is_out: bool, is_error: bool
):
    container = await run.start("sleep", "100")
    script = "echo out; echo bad >&2; exit 3"
    attached = {"AttachStdout": is_out, "AttachStderr": is_error}
    id = await an_exec(api, container.id, "sh", "-c", script, **attached)
    raw = await api.hijack(f"/exec/{id}/start", {})
    frames = await asyncio.wait_for(raw.frames(), 10)
    assert sorted(frames) == [(1, b"out\n")] * is_out + [(2, b"bad\n")] * is_error
    assert (await api.ask("GET", f"/exec/{id}/json"))[1]["ExitCode"] == 3
    raw.writer.close()


@pytest.mark.parametrize("is_out", [True, False])
async def test_of_a_terminal_all_is_standard_output(api: Api, run: Runner, *, is_out: bool):
    container = await run.start("sleep", "100")
    attached = {"AttachStdout": is_out, "AttachStderr": True}
    id = await an_exec(api, container.id, "sh", "-c", "echo out; echo bad >&2", Tty=True, **attached)
    raw = await api.hijack(f"/exec/{id}/start", {"Tty": True})
    content = await asyncio.wait_for(raw.reader.read(-1), 10)
    assert content == (b"out\r\nbad\r\n" if is_out else b"")
    raw.writer.close()


async def test_newer_clients_get_a_content_type_for_framed_output(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    id = await an_exec(api, container.id, "true")
    raw = await api.hijack(f"/exec/{id}/start", {}, version="1.42")
    assert "Content-Type: application/vnd.docker.multiplexed-stream" in raw.head
    assert await raw.frames() == []
    raw.writer.close()


async def test_a_terminal_has_a_size_and_no_frames(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    id = await an_exec(api, container.id, "sh", "-c", "read x; echo you said $x", AttachStdin=True, Tty=True)
    raw = await api.hijack(f"/exec/{id}/start", {"Tty": True})
    assert (await api.ask("POST", f"/exec/{id}/resize?h=40&w=120"))[0] == 200
    raw.writer.write(b"hello\n")
    content = await asyncio.wait_for(raw.reader.read(-1), 10)
    assert content.endswith(b"you said hello\r\n")
    raw.writer.close()


async def test_a_terminal_has_its_size_from_its_start_on(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    for version, shown in (("1.42", b"31 87\r\n"), ("1.41", b"stty: standard input\r\n")):
        asked = {"Tty": True, "AttachStdin": True, "AttachStdout": True, "ConsoleSize": [31, 87]}
        asked["Cmd"] = ["sh", "-c", "read x; stty size"]
        _, made = await api.ask("POST", f"/containers/{container.id}/exec", asked, version=version)
        raw = await api.hijack(f"/exec/{made['Id']}/start", {"Tty": True}, version=version)
        raw.writer.write(b"\n")
        assert (await asyncio.wait_for(raw.reader.read(-1), 10)).endswith(shown)
        raw.writer.close()


async def test_the_keys_let_go_of_a_terminal_and_leave_it_running(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    id = await an_exec(api, container.id, "cat", AttachStdin=True, Tty=True)
    raw = await api.hijack(f"/exec/{id}/start", {"Tty": True})
    raw.writer.write(b"\x10\x11")
    await asyncio.wait_for(raw.reader.read(-1), 10)
    _, found = await api.ask("GET", f"/exec/{id}/json")
    assert found["Running"] is True
    assert run.engine.events.recent(0)[-1].action == "exec_detach"
    raw.writer.close()


async def test_a_detached_exec_responds_at_once(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    id = await an_exec(api, container.id, "sleep", "50")
    assert (await api.ask("POST", f"/exec/{id}/start", {"Detach": True}))[0] == 200
    _, found = await api.ask("GET", f"/exec/{id}/json")
    assert found["Running"] is True


async def test_an_exec_that_was_started_is_not_started_again(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    id = await an_exec(api, container.id, "sh", "-c", "read x", AttachStdin=True)
    raw = await api.hijack(f"/exec/{id}/start", {})
    refused = {"message": f"Error: Exec command {id} is already running"}
    assert await api.ask("POST", f"/exec/{id}/start", {"Detach": True}) == (409, refused)
    raw.writer.write_eof()
    assert await asyncio.wait_for(raw.frames(), 10) == []
    raw.writer.close()
    refused = {"message": f"Error: Exec command {id} has already run"}
    assert await api.ask("POST", f"/exec/{id}/start", {"Detach": True}) == (409, refused)
    again = await api.hijack(f"/exec/{id}/start", {})
    assert await asyncio.wait_for(again.frames(), 10) == [(1, f"{refused['message']}\r\n".encode())]
    again.writer.close()
    assert (await api.ask("POST", f"/exec/{'0' * 64}/start", {"Detach": True}))[0] == 404


async def test_a_command_that_cannot_be_executed_is_reported_in_the_output(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    id = await an_exec(api, container.id, "nosuch")
    raw = await api.hijack(f"/exec/{id}/start", {})
    [(stream, text)] = await asyncio.wait_for(raw.frames(), 10)
    assert stream == 1
    assert b'"nosuch": executable file not found in $PATH' in text
    assert (await api.ask("GET", f"/exec/{id}/json"))[1]["ExitCode"] == 127
    raw.writer.close()


async def test_an_exec_continues_when_its_client_disconnects(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    id = await an_exec(api, container.id, "sleep", "50", AttachStdin=True)
    raw = await api.hijack(f"/exec/{id}/start", {})
    raw.writer.transport.abort()
    await asyncio.sleep(0)
    _, found = await api.ask("GET", f"/exec/{id}/json")
    assert found["Running"] is True
