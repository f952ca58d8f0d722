"""The front door's HAProxy: what it accepts, where requests go, and that no change loses any."""

import asyncio
import json
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

import pytest
from aiohttp import ClientError
from msgspec.structs import replace

from skep.api.telemetry.exposition import render
from skep.dataplane.door.configuration import DoorState, RouteBackend, ServerLine, files, slotted
from skep.dataplane.door.derivation import state_of
from skep.errors import Unavailable
from skep.model.door.settings import DoorSettings
from skep.model.door.traffic import BOUNDS_MS, quantile_ms
from skep.model.measures.readings import ServiceRequests
from skep.model.networks.tables import NetworkHead, NetworkTable, TableService, TableSplit
from skep.model.values.ids import NetworkId, ServiceId, TaskId
from tests.component.test_held_requests import directory
from tests.support.networks.door_rig import DoorRig, a_door, haproxy

__all__ = ["directory"]

pytestmark = pytest.mark.needs("haproxy", "root")

ONE, TWO, THREE, FOUR = "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"
HOSTILE = """a"b'c \\ $HOME %[src] %ci #x { } \\n ; if TRUE"""


def check(state: DoorState, directory: Path) -> None:
    """Let HAProxy check the configuration of ``state``."""
    for name, text in files(state, str(directory)).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    done = subprocess.run(
        haproxy("-c", "-f", str(directory / "haproxy.cfg")), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[WARNING]" not in done.stderr, done.stderr


def state_with(*services: dict[str, str], settings: DoorSettings | None = None) -> DoorState:
    found = {
        ServiceId(f"s{n}"): TableService(id=ServiceId(f"s{n}"), name=f"s{n}", labels=labels)
        for n, labels in enumerate(services)
    }
    head = NetworkHead(id=NetworkId("n"), name="skep-door", is_door=True)
    return state_of(NetworkTable(head=head, services=found), DoorState(), settings or DoorSettings())


def test_haproxy_accepts_every_option(tmp_path: Path) -> None:
    every = {
        "skep.http": "a.example/x,*.b.example",
        "skep.http.port": "8080",
        "skep.http.strip-prefix": "true",
        "skep.http.sticky": "true",
        "skep.http.compress": "true",
        "skep.http.max-body": "10MiB",
        "skep.http.max-failures": "3",
        "skep.http.timeout": "1ms",
        "skep.http.rate": "999999/h",
        "skep.http.protocol": "h2c",
        "skep.http.allow": "10.0.0.0/8,fd00::/8",
        "skep.http.request-header.X-Hostile": HOSTILE,
        "skep.http.response-header.X-Hostile": HOSTILE,
        "skep.http.response-header.Server": "",
    }
    redirects = {
        "skep.http.one": "c.example/~!$&()*+;=:@'%20",
        "skep.http.one.redirect": "https://x.example/%7Ba%7D&$HOME",
        "skep.http.two": "d.example",
        "skep.http.two.redirect": "https",
    }
    settings = DoorSettings(trusted=("10.0.0.0/8", "::1/128"), accepts_proxy=True)
    state = state_with(every, redirects, settings=settings)
    assert len(state.routes) == 4
    check(state, tmp_path)


async def test_ten_thousand_routes_are_served_and_changed(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE, TWO):
        for number in range(5000):
            rig.service(f"s{number}", {"skep.http": f"h{number}.example,h{number}.example/path"})
            rig.task(f"t{number}", f"s{number}", ONE)
        await rig.apply()
        reloads = rig.reloads()
        for url in ("h0.example/", "h4999.example/", "h2500.example/path/x"):
            seen = await rig.ask_task(url)
            assert (seen["task"], seen["path"]) == (ONE, f"/{url.partition('/')[2]}"), url
        assert (await rig.ask("h5000.example/"))[0] == 404
        rig.task("t4999", "s4999", ONE, is_serving=False)
        rig.task("new", "s4999", TWO)
        await rig.apply()
        assert rig.reloads() == reloads, "a task is a command, however many routes there are"
        assert {(await rig.ask_task("h4999.example/"))["task"] for _ in range(4)} == {TWO}
        rig.service("last", {"skep.http": "last.example"})
        rig.task("last", "last", TWO)
        await rig.apply()
        assert rig.reloads() > reloads
        assert (await rig.ask_task("last.example/"))["task"] == TWO
        assert (await rig.ask_task("h0.example/"))["task"] == ONE


def test_a_task_keeps_its_line_and_lines_of_ended_tasks_are_used_last() -> None:
    def server(task: str) -> ServerLine:
        return ServerLine(task=task, address=f"10.0.0.{task}", is_ready=True)

    first = slotted((), map(server, "12"))
    assert [one.task for one in first] == ["1", "2", "", ""]
    second = slotted(first, map(server, "23"))
    assert [one.task for one in second] == ["", "2", "3", ""]
    assert [one.task for one in slotted(second, map(server, "2345"))] == ["4", "2", "3", "5"]
    assert len(slotted(second, map(server, "23456"))) == 8
    assert len(slotted(second, ())) == 4


@asynccontextmanager
async def requests(rig: DoorRig, url: str) -> AsyncIterator[list[str]]:
    """Send requests during the block, on kept and on fresh connections.  Yields the failed ones."""
    failed: list[str] = []
    count, ends = 0, asyncio.Event()
    host, _, path = url.partition("/")

    async def send(*, is_kept: bool) -> None:
        nonlocal count
        async with rig.client() as session:
            while not ends.is_set():
                connection = {} if is_kept else {"Connection": "close"}
                try:
                    async with session.get(f"/{path}", headers={"Host": host, **connection}) as response:
                        text = await response.text()
                        if response.status != 200:
                            failed.append(f"{response.status}: {text}")
                except (ClientError, TimeoutError) as error:
                    failed.append(repr(error))
                count += 1

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(send(is_kept=number % 2 == 0))
        try:
            yield failed
        finally:
            ends.set()
    assert count > 50


async def test_requests_reach_the_longest_route(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE, TWO, THREE):
        status, page, headers = await rig.ask("a.example/")
        assert status == 404
        rig.service("web", {"skep.http": "a.example,*.a.example"})
        rig.service("api", {"skep.http": "a.example/api", "skep.http.strip-prefix": "true"})
        rig.service("none", {"skep.http": "none.example"})
        rig.task("t1", "web", ONE)
        rig.task("t2", "api", TWO)
        await rig.apply()
        for url, task, path in (
            ("a.example/", ONE, "/"),
            ("A.Example.:80/x?y=1", ONE, "/x?y=1"),
            ("sub.a.example/x", ONE, "/x"),
            ("a.example/apis", ONE, "/apis"),
            ("a.example/api", TWO, "/"),
            ("a.example/api/", TWO, "/"),
            ("a.example/api/v1?z", TWO, "/v1?z"),
            ("a.example/api/api", TWO, "/api"),
        ):
            seen = await rig.ask_task(url)
            assert (seen["task"], seen["path"]) == (task, path), url
        for url in ("b.example/", "a.b.a.example/", "example/"):
            assert (await rig.ask(url))[0] == 404, url
        status, page, headers = await rig.ask("none.example/")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert "not available at the moment" in page


async def test_values_arrive_as_they_are_written(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE):
        rig.service(
            "web",
            {
                "skep.http": "a.example",
                "skep.http.request-header.X-Hostile": HOSTILE,
                "skep.http.request-header.X-Gone": "",
                "skep.http.response-header.X-Hostile": HOSTILE,
            },
        )
        rig.task("t1", "web", ONE)
        await rig.apply()
        sent = {
            "X-Forwarded-For": "1.2.3.4",
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Host": "evil.example",
            "X-Forwarded-Prefix": "/evil",
            "Forwarded": "for=1",
            "X-Gone": "x",
        }
        seen = await rig.ask_task("a.example/", sent)
        headers = seen["headers"]
        assert isinstance(headers, dict)
        assert headers["x-hostile"] == HOSTILE
        assert (headers["x-forwarded-for"], headers["x-forwarded-proto"]) == ("127.0.0.1", "http")
        assert headers["x-forwarded-host"] == "a.example"
        assert not {"forwarded", "x-forwarded-prefix", "x-gone"} & headers.keys()
        assert (await rig.ask("a.example/"))[2]["X-Hostile"] == HOSTILE


async def test_only_trusted_proxies_tell_services_about_the_client(tmp_path: Path) -> None:
    async with a_door(tmp_path, trusted=("127.0.0.0/8",)) as rig, rig.tasks(ONE):
        rig.service("web", {"skep.http": "a.example"})
        rig.task("t1", "web", ONE)
        await rig.apply()
        sent = {"X-Forwarded-For": "1.2.3.4", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/x"}
        headers = (await rig.ask_task("a.example/", sent))["headers"]
        assert isinstance(headers, dict)
        assert headers["x-forwarded-for"] in ("1.2.3.4", "127.0.0.1"), "aiohttp keeps one of both lines"
        assert (headers["x-forwarded-proto"], headers["x-forwarded-prefix"]) == ("https", "/x")
        assert headers["x-forwarded-host"] == "a.example"


async def test_limits_answer_with_their_status(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE):
        for name, option, value in (
            ("rate", "rate", "2/h"),
            ("body", "max-body", "10"),
            ("time", "timeout", "50ms"),
            ("allow", "allow", "10.0.0.0/8"),
            ("redirect", "redirect", "https://b.example/x"),
            ("sticky", "sticky", "true"),
            ("compress", "compress", "true"),
        ):
            rig.service(name, {"skep.http": f"{name}.example", f"skep.http.{option}": value})
            rig.task(f"t-{name}", name, ONE)
        await rig.apply()
        assert [(await rig.ask("rate.example/"))[0] for _ in range(4)] == [200, 200, 429, 429]
        assert (await rig.ask("body.example/", method="POST", data=b"x" * 10))[0] == 200
        assert (await rig.ask("body.example/", method="POST", data=b"x" * 11))[0] == 413
        chunked = b"POST / HTTP/1.1\r\nHost: body.example\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        assert b" 411 " in (await rig.exchange(chunked + b"1\r\nx\r\n0\r\n\r\n")).partition(b"\r\n")[0]
        assert (await rig.ask("time.example/?wait=1"))[0] == 504
        assert (await rig.ask("allow.example/"))[0] == 403
        status, _, headers = await rig.ask("redirect.example/y?z")
        assert (status, headers["Location"]) == (308, "https://b.example/x/y?z")
        assert "skep-door" in (await rig.ask("sticky.example/"))[2]["Set-Cookie"]
        assert (await rig.ask("compress.example/"))[2]["Content-Encoding"] == "gzip"


async def test_sticky_routes_of_one_host_keep_a_client_at_its_tasks(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE, TWO, THREE, FOUR):
        port, sticky = str(rig.task_port), {"skep.http.sticky": "true"}
        doc = {"skep.http.doc": "a.example/doc", "skep.http.doc.sticky": "true", "skep.http.doc.port": port}
        rig.service("web", {"skep.http": "a.example", **sticky, **doc, "skep.http.doc.strip-prefix": "true"})
        rig.service("api", {"skep.http": "a.example/api", **sticky})
        for name, address in (("web", ONE), ("web", TWO), ("api", THREE), ("api", FOUR)):
            rig.task(f"{name}-{address}", name, address)
        await rig.apply()
        cookies: dict[str, str] = {}
        seen: dict[str, set[str]] = {}
        for path in ("", "api", "doc") * 8:
            sent = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
            status, body, headers = await rig.ask(f"a.example/{path}", headers=sent)
            assert status == 200
            if "Set-Cookie" in headers:
                name, _, value = headers["Set-Cookie"].partition(";")[0].partition("=")
                cookies[name] = value
            seen.setdefault("api" if path == "api" else "web", set()).add(json.loads(body)["task"])
        assert {name: len(found) for name, found in seen.items()} == {"web": 1, "api": 1}


async def test_two_hundred_changes_within_a_minute_lose_no_request(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE, TWO, THREE):
        rig.service("web", {"skep.http": "a.example"})
        rig.task("t1", "web", ONE)
        rig.task("t2", "web", TWO)
        await rig.apply()
        reloads = rig.reloads()
        async with requests(rig, "a.example/?wait=0.01") as failed, asyncio.timeout(60):
            for _ in range(20):  # rolling updates: the new task comes first, the old one is drained and ends
                for number, address in ((1, ONE), (2, TWO)):
                    rig.task("t3", "web", THREE)
                    await rig.apply()
                    rig.task(f"t{number}", "web", address, is_serving=False)
                    await rig.apply()
                    del rig.endpoints[f"t{number}"]
                    await rig.apply()
                    rig.task(f"t{number}", "web", address)
                    await rig.apply()
                    del rig.endpoints["t3"]
                    await rig.apply()
            assert rig.reloads() == reloads  # tasks come and go by commands
            for number in range(5):
                rig.service(f"more{number}", {"skep.http": f"more{number}.example"})
                await rig.apply()
            assert rig.reloads() == reloads + 5
        assert failed == []


async def test_new_tasks_of_a_staged_update_get_their_share_of_the_requests(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE, TWO, THREE):
        rig.service("web", {"skep.http": "a.example"})
        rig.task("t1", "web", ONE)
        rig.task("t2", "web", TWO)
        rig.task("t3", "web", THREE)
        rig.endpoints["t3"] = replace(rig.endpoints["t3"], version=2)
        await rig.apply()
        reloads = rig.reloads()
        for percent in (5, 25, 0, 100):
            split = TableSplit(percent, (2,))
            rig.services["web"] = replace(rig.services["web"], split=split)
            await rig.apply()
            seen: Counter[object] = Counter()
            for _ in range(200):
                seen[(await rig.ask_task("a.example/"))["task"]] += 1
            # HAProxy takes turns, so that the share of any 200 requests is nearly exact.
            assert abs(seen[THREE] - 2 * percent) <= 4, (percent, seen)
        assert rig.reloads() == reloads


async def test_requests_of_new_tasks_are_counted_with_their_errors_and_times(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE, TWO):
        rig.service("web", {"skep.http": "a.example"})
        rig.services["web"] = replace(rig.services["web"], split=TableSplit(50, (2,)))
        rig.task("t1", "web", ONE)
        rig.task("t2", "web", TWO)
        rig.endpoints["t2"] = replace(rig.endpoints["t2"], version=2)
        await rig.apply()
        await rig.door.read_statistics()
        for number in range(40):
            await rig.ask(f"a.example/?wait=0.02{'&status=500' if number < 20 else ''}")
        await rig.wait_counted(40)
        await rig.door.read_statistics()
        assert rig.door.requests().keys() == {"t2"}
        (seen,) = rig.door.requests().values()
        assert (seen.requests, seen.errors) == (20, 10)
        assert 20 <= seen.milliseconds / seen.requests < 500
        rig.service("more", {"skep.http": "more.example"})  # HAProxy is reloaded, and counts from 0
        await rig.apply()
        await rig.ask("a.example/")
        await rig.ask("a.example/")
        await rig.wait_counted(42)
        await rig.door.read_statistics()
        assert rig.door.requests()[TaskId("t2")].requests == 21


async def test_requests_are_counted_by_route_with_their_errors_and_latencies(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE):
        rig.service("web", {"skep.http": "a.example/shop,b.example"})
        rig.service("idle", {"skep.http": "idle.example"})
        rig.service("empty", {"skep.http": "empty.example"})
        rig.task("t1", "web", ONE)
        rig.task("t2", "idle", ONE)
        await rig.apply()
        await rig.ask("a.example/shop")
        await rig.wait_counted(1)
        await rig.door.read_statistics()
        assert rig.door.recent_routes() == (), "the first reading tells where the counters start"
        seen_ms = []
        for number in range(20):
            began = perf_counter()
            await rig.ask(
                f"a.example/shop?wait={0.3 if number < 4 else 0}{'&status=500' if number == 5 else ''}"
            )
            seen_ms.append(1000 * (perf_counter() - began))
        await rig.ask("b.example/")
        await rig.ask("empty.example/")
        await rig.wait_counted(23)
        await rig.door.read_statistics()
        web, empty = rig.door.recent_routes()
        assert (web.service_id, web.route, web.requests, web.errors) == ("web", "a.example/shop", 21, 1)
        assert (empty.route, empty.requests, empty.errors, sum(empty.buckets)) == ("empty.example", 1, 1, 0)
        assert sum(web.buckets) == 21
        # A client waits for longer than HAProxy, and for much longer on a busy machine.
        bounds = [next(bound for bound in BOUNDS_MS if bound >= ms) for ms in sorted(seen_ms)]
        fast, slow = quantile_ms(web.buckets, 0.5), quantile_ms(web.buckets, 0.95)
        assert (fast or 0) <= bounds[12], web.buckets
        assert 250 <= (slow or 0) <= bounds[-1], web.buckets
        rig.service("more", {"skep.http": "more.example"})  # HAProxy is reloaded, and counts from 0
        await rig.apply()
        await rig.ask("b.example/")
        await rig.wait_counted(24)
        await rig.door.read_statistics()
        assert rig.door.recent_routes()[0].requests == 22
        page = render(rig.door.routes.families()).decode()
        assert 'skep_door_requests_total{route="a.example/shop"} 22' in page
        assert 'skep_door_errors_total{route="a.example/shop"} 1' in page
        assert 'skep_door_response_seconds_bucket{route="a.example/shop",le="+Inf"} 22' in page


async def test_requests_of_services_with_a_target_are_counted_in_flight_and_by_rate(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE, TWO):
        rig.service("plain", {"skep.http": "plain.example"})
        rig.service("web", {"skep.http": "a.example", "skep.autoscale.requests": "5"})
        rig.service("idle", {"skep.http": "b.example,b.example/x", "skep.autoscale.rps": "5"})
        for number, service in enumerate(("plain", "web", "idle")):
            rig.task(f"t{number}", service, ONE)
        await rig.apply()
        await rig.door.read_statistics()
        assert rig.door.service_requests() == {}, "a rate needs two readings"
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(rig.ask("a.example/?wait=1.0"))
            group.create_task(rig.ask("plain.example/?wait=1.0"))
            async with asyncio.timeout(10):
                while True:
                    await rig.door.read_statistics()
                    found = rig.door.service_requests()
                    if found[ServiceId("web")].in_flight > 0:
                        break
                    await asyncio.sleep(0.01)
        assert found.keys() == {"web", "idle"}
        assert found[ServiceId("idle")] == ServiceRequests()
        await rig.door.read_statistics()
        assert rig.door.service_requests()[ServiceId("web")].per_second > 0
        rig.service("more", {"skep.http": "more.example"})  # HAProxy is reloaded, and counts from 0
        await rig.apply()
        await rig.ask("a.example/")
        await rig.door.read_statistics()
        assert rig.door.service_requests()[ServiceId("web")].per_second > 0
        rig.services["web"] = replace(rig.services["web"], labels={"skep.http": "a.example"})
        await rig.apply()
        await rig.door.read_statistics()
        assert rig.door.service_requests().keys() == {"idle"}


async def test_an_idle_connection_outlives_a_reload(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", {"skep.http": "a.example"})
        rig.task("t1", "web", ONE)
        await rig.apply()
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        for change in ("before", "reloaded"):
            if change == "reloaded":
                rig.service("more", {"skep.http": "more.example"})
                await rig.apply()
            writer.write(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            async with asyncio.timeout(5):
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200"), change
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            if change == "before":
                assert b"connection: close" not in head
        assert b"connection: close" in head  # it leaves the former process
        writer.close()


async def test_a_drained_task_gets_no_new_request(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE, TWO):
        rig.service("web", {"skep.http": "a.example"})
        rig.task("t1", "web", ONE)
        rig.task("t2", "web", TWO)
        await rig.apply()
        assert {(await rig.ask_task("a.example/"))["task"] for _ in range(8)} == {ONE, TWO}
        rig.task("t1", "web", ONE, is_serving=False)
        await rig.apply()
        assert {(await rig.ask_task("a.example/"))["task"] for _ in range(8)} == {TWO}


async def test_a_websocket_outlives_its_drain_and_a_reload(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE, TWO), rig.client() as session:
        rig.service("web", {"skep.http": "a.example"})
        rig.task("t1", "web", ONE)
        await rig.apply()
        async with session.ws_connect("/", headers={"Host": "a.example"}) as channel:
            for change in ("before", "drained", "reloaded"):
                if change == "drained":
                    rig.task("t1", "web", ONE, is_serving=False)
                if change == "reloaded":
                    rig.service("more", {"skep.http": "more.example"})
                await rig.apply()
                await channel.send_str(change)
                assert await channel.receive_str(timeout=5) == f"{change} again"


async def test_a_dead_task_is_left_out_before_the_managers_know(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE):
        rig.service("web", {"skep.http": "a.example"})
        rig.task("t1", "web", ONE)
        rig.task("t2", "web", TWO)  # nothing listens there
        await rig.apply()
        assert {(await rig.ask_task("a.example/"))["task"] for _ in range(8)} == {ONE}


async def test_a_restarted_haproxy_and_a_restarted_node_continue(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, rig.tasks(ONE, TWO):
        rig.service("web", {"skep.http": "a.example"})
        rig.task("t1", "web", ONE)
        await rig.apply()
        rig.stop()
        rig.task("t1", "web", ONE, is_serving=False)
        rig.task("t2", "web", TWO)
        with pytest.raises(Unavailable):
            await rig.apply(retries=False)
        assert not rig.door.serves()
        await rig.start()  # with the files of the failed attempt
        assert (await rig.ask_task("a.example/"))["task"] == TWO
        await rig.apply()
        assert rig.door.serves()
        again = DoorRig(tmp_path)
        again.port, again.task_port, again.door = rig.port, rig.task_port, rig.door
        rig.door._applied = None  # a new process does not know what HAProxy has
        rig.task("t2", "web", TWO, is_serving=False)
        rig.task("t1", "web", ONE)
        await rig.apply()
        assert {(await rig.ask_task("a.example/"))["task"] for _ in range(4)} == {ONE}


async def test_links_of_the_container_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    directory = tmp_path / "volume"
    directory.mkdir()
    async with a_door(directory) as rig:
        (directory / "routes.map").unlink()
        (directory / "routes.map").symlink_to(outside)
        (directory / ".haproxy.cfg.new").symlink_to(outside)
        rig.service("web", {"skep.http": "a.example"})
        await rig.apply()
        assert outside.read_text() == "untouched"
        assert not (directory / "routes.map").is_symlink()
        (directory / "admin.sock").unlink()
        (directory / "admin.sock").symlink_to(outside)
        rig.service("more", {"skep.http": "b.example"})
        with pytest.raises(Unavailable):
            await rig.apply(retries=False)


def test_a_backend_without_tasks_has_lines_for_two() -> None:
    state = state_with({"skep.http": "a.example"})
    (backend,) = state.backends.values()
    assert isinstance(backend, RouteBackend)
    assert [one.is_ready for one in backend.servers] == [False, False]
