"""``skep events`` over connections that break: nothing twice, nothing missed, and an end where something was."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.api.client.requests import filters_of
from skep.cli.see.events import EventStream, follow, line_of, stream_of, whole_line_of
from skep.errors import FailedPrecondition, InvalidArgument, SkepError, Unavailable
from tests.support.clients.command_rig import SKEP

Reply = Callable[[str], tuple[int, bytes]]


def event(number: int) -> bytes:
    content = {
        "Type": "task",
        "Action": "die",
        "Actor": {"ID": f"t{number}", "Attributes": {"name": "web.1.t", "error": "\x1b[2J"}},
        "timeNano": number * 10**9,
        "Cursor": f"1-{number}",
    }
    return msgspec.json.encode(content) + b"\n"


@asynccontextmanager
async def a_manager(directory: Path, reply: Reply) -> AsyncIterator[ApiClient]:
    """Answers each request for events with what ``reply`` gives for its cursor, and closes the connection."""
    asked: list[Mapping[str, str]] = []

    async def events(request: web.Request) -> web.StreamResponse:
        asked.append(request.query)
        status, content = reply(request.query.get("after", ""))
        response = web.StreamResponse(status=status, headers={"Connection": "close"})
        await response.prepare(request)
        await response.write(content)
        return response

    async def ping(_: web.Request) -> web.Response:
        return web.Response(headers={"Api-Version": "1.41"})

    async def quorum(_: web.Request) -> web.Response:
        managers = [{"Hostname": f"m{number}", "IsReachable": number == 1} for number in (1, 2, 3)]
        return web.json_response({"HasLeader": False, "Since": "2026-11-21T18:38:04Z", "Managers": managers})

    app = web.Application()
    app.add_routes([web.get("/_ping", ping)])
    for prefix in ("", "/v{version:[0-9.]+}"):
        app.add_routes([web.get(f"{prefix}/skep/events", events), web.get(f"{prefix}/skep/quorum", quorum)])
    runner = web.AppRunner(app)
    await runner.setup()
    path = directory / "s"
    await web.UnixSite(runner, str(path)).start()
    try:
        async with ApiClient.local(path, "the manager") as client:
            yield client
    finally:
        await runner.cleanup()


async def read(client: ApiClient, most: int, after: str = "") -> list[Any]:
    found = []
    async with aclosing(
        follow(client, {"type": ["task"]}, EventStream(after=after), SystemClock())
    ) as stream:
        async for one in stream:
            found.append(one["Actor"]["ID"])
            if len(found) == most:
                break
    return found


async def test_a_stream_that_breaks_goes_on_after_its_last_event(tmp_path):
    def reply(after: str) -> tuple[int, bytes]:
        number = int(after.partition("-")[2] or 0)
        # Cut off in the middle of an event, and refused now and then.
        return (
            (503, b'{"message":"no leader"}')
            if number == 4 and next(tries) == 0
            else (
                200,
                event(number + 1) + event(number + 2) + event(number + 3)[:40],
            )
        )

    tries = count()
    async with a_manager(tmp_path, reply) as client:
        assert await read(client, 6) == ["t1", "t2", "t3", "t4", "t5", "t6"]
        assert await read(client, 1, "1-7") == ["t8"]


async def test_a_stream_that_breaks_before_its_first_event_goes_on(tmp_path: Path) -> None:
    """As the first one after a cursor: nothing has happened since, and the manager is restarted."""
    replies = iter([(200, event(1)[:9]), (200, event(2))])
    async with a_manager(tmp_path, lambda _: next(replies)) as client, asyncio.timeout(60):
        assert await read(client, 1, after="1-1") == ["t2"]


async def test_without_a_leader_the_command_says_so_before_it_waits(tmp_path: Path) -> None:
    async with a_manager(tmp_path, lambda after: (200, event(1))):
        command = (SKEP, "--host", f"unix://{tmp_path}/s", "events", "--until", "now")
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
    assert process.returncode == 0, err
    assert b"web.1" in out
    assert b"NO LEADER since 2026-11-21 18:38:04 UTC: 1 of 3 managers responds (m2, m3 do not)" in err


async def test_a_stream_with_an_end_ends_there(tmp_path):
    ended = EventStream(since="1.000000000", until_ns=5 * 10**9)
    async with a_manager(tmp_path, lambda after: (200, event(1) + event(2))) as client:
        found = [one["Actor"]["ID"] async for one in follow(client, {}, ended, SystemClock())]
    assert found == ["t1", "t2"]
    assert ended.query("") == {"since": "1.000000000", "until": "5.000000000"}
    assert ended.query("1-7") == {"after": "1-7", "until": "5.000000000"}


def test_times_are_those_of_the_history() -> None:
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    options = {"after": "", "since": "30s", "until": "now", "nodes": "all"}
    at = int(now.timestamp())
    assert stream_of(options, now) == EventStream(
        since=f"{at - 30}.000000000", until_ns=at * 10**9, nodes="all"
    )
    with pytest.raises(InvalidArgument, match="--since now is after --until 30s"):
        stream_of(options | {"since": "now", "until": "30s"}, now)
    with pytest.raises(InvalidArgument, match="--since and --after cannot be used together"):
        stream_of(options | {"after": "1-7"}, now)


async def test_lost_events_end_the_command_with_the_reason(tmp_path):
    lost = b'{"message":"the client was too slow and has lost events"}\n'
    async with a_manager(tmp_path, lambda after: (200, event(1) + lost)) as client:
        with pytest.raises(FailedPrecondition, match="has lost events"):
            await read(client, 5)
    gone = (400, b'{"message":"not all events after cursor 1-1 are kept"}')
    async with a_manager(tmp_path, lambda after: gone if after else (200, event(1))) as client:
        with pytest.raises(SkepError, match="not all events after"):
            await read(client, 5)


async def test_a_first_connection_that_fails_is_an_error(tmp_path):
    async with a_manager(tmp_path, lambda after: (503, b'{"message":"not a manager"}')) as client:
        with pytest.raises(Unavailable, match="not a manager"):
            await read(client, 1)


def test_events_have_names_before_ids_and_nothing_that_a_terminal_obeys() -> None:
    died = {
        "Type": "task",
        "Action": "die",
        "Actor": {
            "ID": "5rtugg83s0k5e2d81lhsb36fe",
            "Attributes": {
                "com.docker.swarm.node.id": "7me94608blfye704qouf525ku",
                "com.docker.swarm.service.name": "web",
                "error": "\x1b[2J",
                "name": "web.1.5rtugg83s0k5e2d81lhsb36fe",
            },
        },
        "timeNano": 10**9,
    }
    short = "1970-01-01T00:00:01Z task die web.1 (5rtugg83s0k5) error=[2J node=7me94608blfy"
    assert line_of(died) == short
    assert whole_line_of(died) == (
        "1970-01-01T00:00:01Z task die 5rtugg83s0k5e2d81lhsb36fe (com.docker.swarm.node.id=7me94608blfye704qouf525ku, "
        "com.docker.swarm.service.name=web, error=[2J, name=web.1.5rtugg83s0k5e2d81lhsb36fe)"
    ), "as docker events has it"
    died["Actor"]["Attributes"] |= {"node.name": "w1", "slot": "0", "name": "web.7me94608blfy.5rtugg83s0k5"}
    assert line_of(died) == "1970-01-01T00:00:01Z task die web.0 (5rtugg83s0k5) error=[2J node.name=w1"
    del died["Actor"]["Attributes"]["slot"]
    assert line_of(died).split()[3] == "web.w1", "a task of a global service"


def test_filters_are_key_and_value():
    assert filters_of(("type=task", "Type = node", "label=a=b")) == {
        "type": ["task", "node"],
        "label": ["a=b"],
    }
    with pytest.raises(InvalidArgument, match="expected KEY=VALUE"):
        filters_of(("task",))
