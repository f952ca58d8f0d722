"""Requests for services that are scaled to zero: held by the node, released to the HAProxy that runs then."""

import asyncio
import json
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import ClientSession

from skep.dataplane.door import listener
from skep.dataplane.door.configuration import HOLD
from skep.dataplane.door.holding import HeldRequests, HoldLimits
from skep.errors import Unavailable
from skep.model.values.ids import ServiceId
from tests.support.networks.door_rig import DoorRig, a_door

pytestmark = pytest.mark.needs("haproxy", "root")

ONE, TWO = "127.0.0.2", "127.0.0.3"
WEB = {"skep.http": "a.example", "skep.autoscale": "0..3"}


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that HAProxy's own user can reach, unlike those of pytest."""
    top = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="skep-door-"))
    top.chmod(0o755)
    try:
        (top / "door").mkdir()
        yield top / "door"
    finally:
        shutil.rmtree(top)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_held(rig: DoorRig, *services: str) -> None:
    """Wait until the node holds requests for these services and no others."""
    await until(lambda: rig.door.held.held() == [*services])


async def test_a_request_waits_for_a_task_over_reloads_and_changed_options(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        await rig.apply()
        body = b"x" * 1_000_000
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(rig.ask("a.example/y?z", headers={"X-Forwarded-For": "1.2.3.4"}))
            sent = group.create_task(rig.ask("a.example/", method="POST", data=body))
            await until(lambda: rig.door.held.open().get(ServiceId("web")) == 2)
            assert rig.door.held.held() == ["web"]
            assert rig.door.held.changed.is_set()
            rig.service("more", {"skep.http": "more.example"})
            await rig.apply()
            rig.service("web", {**WEB, "skep.http.response-header.X-New": "new"})
            await rig.apply()
            rig.task("t1", "web", ONE)
            await rig.apply()
        status, text, headers = asked.result()
        assert (status, headers["X-New"]) == (200, "new")
        assert '"path": "/y?z"' in text
        assert '"x-forwarded-for": "127.0.0.1"' in text
        assert "x-skep-held-for" not in text
        assert sent.result()[0] == 200
        assert f'"length": {len(body)}' in sent.result()[1]
        await until(lambda: not rig.door.held.open())
        assert rig.door.held.held() == []
        assert (await rig.ask_task("a.example/"))["task"] == ONE
        assert rig.door.held.opened[ServiceId("web")] == 2, "later requests do not pass through the node"


async def test_a_service_returns_to_zero_and_its_next_request_waits_again(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        for number in range(3):
            await rig.apply()
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(rig.ask_task("a.example/"))
                await until_held(rig, "web")
                rig.task(f"t{number}", "web", ONE)
                await rig.apply()
            assert asked.result()["task"] == ONE
            assert rig.door.held.take_served() == {"web"}, "its next wake waits for nothing"
            assert rig.door.held.take_served() == set()
            del rig.endpoints[f"t{number}"]


async def test_a_websocket_is_held_and_keeps_the_service_from_being_idle(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE), rig.client() as session:
        rig.service("web", WEB)
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            opened = group.create_task(session.ws_connect("/", headers={"Host": "a.example"}))
            await until_held(rig, "web")
            rig.task("t1", "web", ONE)
            await rig.apply()
        async with opened.result() as channel:
            await channel.send_str("held")
            assert await channel.receive_str(timeout=5) == "held again"
            await rig.door.read_statistics()
            await rig.door.read_statistics()
            assert rig.door.idle().keys() == {"web"}
            assert rig.door.held.open() == {"web": 1}


async def test_beyond_the_limits_clients_get_a_page(directory: Path) -> None:
    async with a_door(directory, HoldLimits(of_service=2, of_node=3)) as rig, rig.tasks(ONE):
        for name in ("a", "b"):
            rig.service(name, {"skep.http": f"{name}.example", "skep.autoscale": "0..3"})
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(rig.ask("a.example/")) for _ in range(4)]
            await until(lambda: sum(one.done() for one in asked) == 2)
            asked += [group.create_task(rig.ask("b.example/")) for _ in range(2)]
            await until(lambda: sum(one.done() for one in asked) == 3)
            for status, text, headers in [one.result() for one in asked if one.done()]:
                assert (status, headers["Retry-After"]) == (503, "5")
                assert "is starting" in text
            for name in ("a", "b"):
                rig.task(f"t-{name}", name, ONE)
            await rig.apply()
        assert sorted(one.result()[0] for one in asked) == [200, 200, 200, 503, 503, 503]


async def test_after_its_time_a_held_request_gets_the_page(directory: Path) -> None:
    async with a_door(directory, HoldLimits(seconds=0.2)) as rig:
        rig.service("web", WEB)
        await rig.apply()
        status, text, headers = await rig.ask("a.example/", method="POST", data=b"x" * 1_000_000)
        assert (status, headers["Retry-After"]) == (503, "5")
        assert "is starting" in text
        assert rig.door.held.held() == []


async def test_a_client_that_gives_up_frees_its_place(directory: Path) -> None:
    async with a_door(directory) as rig:
        rig.service("web", WEB)
        await rig.apply()
        _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        await until_held(rig, "web")
        writer.close()
        await until_held(rig)


async def test_refused_requests_wake_nothing(directory: Path) -> None:
    async with a_door(directory) as rig:
        rig.service("closed", {**WEB, "skep.http.allow": "10.0.0.0/8"})
        rig.service("away", {**WEB, "skep.http": "b.example", "skep.http.redirect": "https"})
        rig.service("stopped", {"skep.http": "c.example"})
        await rig.apply()
        assert (await rig.ask("a.example/"))[0] == 403
        assert (await rig.ask("b.example/"))[0] == 308
        status, _, headers = await rig.ask("c.example/")
        assert status == 503
        assert "x-skep-unreached" not in headers, "it is for the node only"
        assert not rig.door.held.opened


async def test_held_requests_get_a_page_if_the_node_process_ends(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(rig.ask("a.example/"))
            await until_held(rig, "web")
            rig.restart_node()
        status, _, headers = asked.result()
        assert (status, headers["Retry-After"]) == (503, "5")
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            again = group.create_task(rig.ask_task("a.example/"))
            await until_held(rig, "web")
            rig.task("t1", "web", ONE)
            await rig.apply()
        assert again.result()["task"] == ONE


async def test_a_held_request_waits_until_the_application_listens(directory: Path) -> None:
    async with a_door(directory) as rig:
        rig.service("web", WEB)
        await rig.apply()
        body = b"x" * 1_000_000
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(rig.ask("a.example/"))
            sent = group.create_task(rig.ask("a.example/", method="POST", data=body))
            await until(lambda: rig.door.held.open() == {"web": 2})
            rig.task("t1", "web", ONE)
            await rig.apply()
            while await released(rig) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            async with rig.tasks(ONE):
                assert (await asked)[0] == 200
                status, text, headers = await sent
        assert (status, json.loads(text)["length"]) == (200, len(body))
        assert "x-skep-unreached" not in headers
        await until(lambda: not rig.door.held.open())


async def released(rig: DoorRig) -> int:
    """Return how often the node has sent a request to HAProxy."""
    text = await rig.door._ask(rig.directory / "admin.sock", "show stat released 1 -1\n")
    columns, row = (line.split(",") for line in text.strip().splitlines())
    return int(row[columns.index("stot")])


async def test_a_request_that_reached_no_task_waits_for_the_next_one(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(TWO):
        rig.service("web", WEB)
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(rig.ask_task("a.example/"))
            await until_held(rig, "web")
            rig.task("t1", "web", ONE)
            await rig.apply()
            while not await released(rig):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            del rig.endpoints["t1"]
            await rig.apply()
            assert rig.door.held.held() == ["web"]
            rig.task("t2", "web", TWO)
            await rig.apply()
        assert asked.result()["task"] == TWO


async def test_a_task_cannot_have_its_request_sent_again(directory: Path) -> None:
    async with a_door(directory) as rig:
        rig.service("web", WEB)
        await rig.apply()
        requests = 0

        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal requests
            requests += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 503 No\r\nX-Skep-Unreached: yes\r\nContent-Length: 2\r\n\r\nmy")
            writer.close()

        async with await asyncio.start_server(respond, ONE, rig.task_port):
            rig.task("t1", "web", ONE)
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(rig.ask("a.example/"))
                await until_held(rig, "web")
                await rig.apply()
            assert (asked.result()[:2], requests) == ((503, "my"), 1)


async def test_a_service_without_a_place_gets_one_of_the_service_with_most(directory: Path) -> None:
    async with a_door(directory, HoldLimits(of_service=3, of_node=3)) as rig, rig.tasks(ONE):
        for name in ("a", "b"):
            rig.service(name, {"skep.http": f"{name}.example", "skep.autoscale": "0..3"})
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            many = [group.create_task(rig.ask("a.example/")) for _ in range(3)]
            await until(lambda: rig.door.held.open() == {"a": 3})
            few = group.create_task(rig.ask("b.example/"))
            await until(lambda: sum(one.done() for one in many) == 1)
            assert rig.door.held.held() == ["a", "b"]
            for name in ("a", "b"):
                rig.task(f"t-{name}", name, ONE)
            await rig.apply()
        assert few.result()[0] == 200
        assert sorted(one.result()[0] for one in many) == [200, 200, 503]


async def test_a_refused_request_wakes_its_service(directory: Path) -> None:
    async with a_door(directory, HoldLimits(of_node=1)) as rig:
        for name in ("a", "b"):
            rig.service(name, {"skep.http": f"{name}.example", "skep.autoscale": "0..3"})
        await rig.apply()
        held = asyncio.create_task(rig.ask("a.example/"))
        await until_held(rig, "a")
        rig.door.held.changed.clear()
        assert (await rig.ask("b.example/"))[0] == 503
        assert rig.door.held.changed.is_set()
        assert rig.door.held.held() == ["a", "b"]
        held.cancel()


async def test_requests_are_held_while_the_removal_of_the_last_task_is_not_confirmed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        rig.task("t1", "web", ONE)
        await rig.apply()

        async def is_alone(_: Path) -> bool:
            return False

        with monkeypatch.context() as patched:
            patched.setattr(listener, "RELOAD_S_MAX", 0.3)
            patched.setattr(rig.door, "_is_alone", is_alone)
            del rig.endpoints["t1"]
            rig.service("more", {"skep.http": "more.example"})
            with pytest.raises(Unavailable):
                await rig.apply(retries=False)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(rig.ask("a.example/"))
            await until(lambda: asked.done() or rig.door.held.held() == ["web"])
            assert rig.door.held.changed.is_set()
            rig.task("t1", "web", ONE)
            await rig.apply()
        assert asked.result()[0] == 200


async def test_malformed_statistics_end_no_held_request(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "SAMPLE_S", 0.02)
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.restart_node(is_holding=False)
        rig.service("web", WEB)
        rig.service("more", {"skep.http": "b.example", "skep.autoscale": "0..3"})
        rig.task("t2", "more", ONE)
        await rig.apply()
        asks, ask = 0, rig.door._ask

        async def cut(path: Path, request: str, bytes_max: int = 1 << 20) -> str:
            nonlocal asks
            text = await ask(path, request, bytes_max)
            if not request.startswith("show info;show stat"):
                return text
            asks += 1
            return text[: text.rindex("BACKEND") + 9]

        monkeypatch.setattr(rig.door, "_ask", cut)
        run = asyncio.create_task(rig.door.run())
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(rig.ask("a.example/"))
            await until(lambda: run.done() or (rig.door.held.held() == ["web"] and asks > 2))
            assert not run.done()
            rig.task("t1", "web", ONE)
            await rig.apply()
        assert asked.result()[0] == 200
        run.cancel()


async def test_the_socket_is_served_again_when_holding_starts_again(directory: Path) -> None:
    held = HeldRequests()
    held.listen(directory)
    for _ in range(2):
        run = asyncio.create_task(held.run())
        await asyncio.sleep(0)
        _, writer = await asyncio.open_unix_connection(directory / HOLD)
        writer.close()
        run.cancel()
        await asyncio.wait([run])
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_unix_connection(directory / HOLD)


async def test_a_request_counts_once_for_its_routes_rate(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", {**WEB, "skep.http.rate": "2/m"})
        rig.service("quick", {"skep.http": "b.example", "skep.autoscale": "0..3", "skep.http.rate": "1/s"})
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(rig.ask("a.example/"))]
            asked += [group.create_task(rig.ask("b.example/"))]
            await until(lambda: rig.door.held.open() == {"web": 1, "quick": 1})
            await asyncio.sleep(1.1)  # HAProxy has forgotten the first one
            asked += [group.create_task(rig.ask("b.example/"))]
            await until(lambda: rig.door.held.open() == {"web": 1, "quick": 2})
            rig.task("t1", "web", ONE)
            rig.task("t2", "quick", ONE)
            await rig.apply()
        assert [one.result()[0] for one in asked] == [200, 200, 200]
        assert [(await rig.ask("a.example/"))[0] for _ in range(2)] == [200, 429]
        del rig.endpoints["t1"]
        await rig.apply()
        assert (await rig.ask("a.example/"))[0] == 429, "a request to be held counts as well"


async def test_the_node_accepts_as_many_connections_as_it_can_hold_or_refuse(directory: Path) -> None:
    async with a_door(directory, HoldLimits(of_node=2)) as rig:
        rig.service("web", WEB)
        await rig.apply()
        asked = []
        for _ in range(10):
            asked += [(await asyncio.open_connection("127.0.0.1", rig.port))[1]]
            asked[-1].write(b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 999\r\n\r\n")
        await until(lambda: rig.door.held.open() == {"web": 4})
        await rig.ask("elsewhere.example/")
        assert rig.door.held.opened == {"web": 4}
        for writer in asked:
            writer.close()
        await until(lambda: not rig.door.held.open())


async def test_connections_that_pass_through_the_node_have_a_bound(directory: Path) -> None:
    async with (
        a_door(directory, HoldLimits(passed=1)) as rig,
        rig.tasks(ONE),
        rig.client() as session,
    ):
        rig.service("web", WEB)
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            opened = group.create_task(session.ws_connect("/", headers={"Host": "a.example"}))
            await until_held(rig, "web")
            rig.task("t1", "web", ONE)
            await rig.apply()
        async with opened.result():
            assert rig.door.held.held() == [], "a WebSocket with a response has no place"
            del rig.endpoints["t1"]
            await rig.apply()
            assert (await rig.ask("a.example/"))[0] == 503
            assert rig.door.held.held() == ["web"], "it is woken all the same"


async def test_a_request_for_an_unknown_service_wakes_nothing(directory: Path) -> None:
    async with a_door(directory) as rig:
        rig.service("web", WEB)
        await rig.apply()
        reader, writer = await asyncio.open_unix_connection(directory / HOLD)
        writer.write(bytes(16) + b"GET / HTTP/1.1\r\nX-Skep-Held-For: other\r\n\r\n")
        assert b" 503 " in await reader.readline()
        writer.close()
        assert rig.door.held.held() == []
        assert not rig.door.held.opened


def test_a_burst_waits_in_the_backlog(directory: Path) -> None:
    held = HeldRequests()

    async def listen() -> None:
        held.listen(directory)

    asyncio.run(listen())
    clients = [socket.socket(socket.AF_UNIX) for _ in range(300)]
    for one in clients:
        one.setblocking(False)
        one.connect(str(directory / HOLD))
        one.close()
    held.close()


@pytest.mark.parametrize("length", [100_000, 200_000])
async def test_a_client_that_gives_up_a_long_request_frees_its_place(directory: Path, length: int) -> None:
    async with a_door(directory) as rig:
        rig.service("web", WEB)
        await rig.apply()
        _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n" % length)
        writer.write(b"x" * length)
        await until_held(rig, "web")
        writer.transport.abort()
        await until_held(rig)


async def test_a_head_that_is_too_long_to_be_held_wakes_and_gets_the_page(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        found = []
        for size in (14_000, 14_500, 15_000, 15_150):
            rig.endpoints.pop("t1", None)
            await rig.apply()
            async with asyncio.TaskGroup() as group:
                long = group.create_task(send_head(rig, size))
                await until_held(rig, "web")
                rig.task("t1", "web", ONE)
                await rig.apply()
            found += [long.result()]
            assert (await send_head(rig, size))[0] == "200"
        assert [status for status, _ in found] == ["200", "200", "503", "503"]
        assert "more than 14 KiB of headers cannot wait" in found[-1][1]


async def send_head(rig: DoorRig, size: int) -> tuple[str, str]:
    """Return the status of the response to a request with long headers, and the rest of the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    lines = b"".join(b"X-Long: %s\r\n" % (b"x" * (size // 4)) for _ in range(4))
    writer.write(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n%s\r\n" % lines)
    status = (await reader.readline()).split()[1].decode()
    rest = (await reader.read()).decode()
    writer.close()
    return status, rest


async def test_a_held_request_has_one_line_in_the_log(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            group.create_task(rig.ask("a.example/one"))
            await until_held(rig, "web")
            rig.task("t1", "web", ONE)
            await rig.apply()
        await rig.ask("a.example/two")
        await until(lambda: "two" in rig.log())
        lines = [json.loads(line) for line in rig.log().splitlines() if '"path"' in line]
        assert [(one["path"], one["status"]) for one in lines] == [("/one", 200), ("/two", 200)]


async def test_a_request_of_a_connection_that_was_idle_during_a_reload_is_held(directory: Path) -> None:
    """Its connection belongs to the former process, which knows neither later routes nor which tasks have ended."""
    late = {"skep.http": "late.example", "skep.autoscale": "0..3", "skep.http.rate": "2/h"}
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(a_door(directory))
        await stack.enter_async_context(rig.tasks(ONE))
        rig.service("web", WEB)
        rig.task("t1", "web", ONE)
        await rig.apply()

        async def ask(session: ClientSession, host: str) -> int:
            async with session.get("/", headers={"Host": host}) as response:
                await response.read()
                return response.status

        idle = [await stack.enter_async_context(rig.client()) for _ in range(3)]
        assert [await ask(one, "a.example") for one in idle] == [200] * 3
        rig.service("late", late)
        await rig.apply()
        assert rig.reloads() == 2
        assert await ask(idle[0], "a.example") == 200
        assert not rig.door.held.opened, "a request to a task does not pass through the node"
        del rig.endpoints["t1"]
        await rig.apply()
        for client, service, host in ((idle[1], "web", "a.example"), (idle[2], "late", "late.example")):
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(ask(client, host))
                await until_held(rig, service)
                rig.task(f"of-{service}", service, ONE)
                await rig.apply()
            assert asked.result() == 200
            assert rig.door.held.opened[ServiceId(service)] == 1
        statuses = [(await rig.ask("late.example/"))[0] for _ in range(2)]
        assert statuses == [200, 429], "a held request counts once for the rate"
