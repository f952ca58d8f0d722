"""Requests for services that are scaled to zero: held by the node, released to the HAProxy that runs then."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from skep.dataplane.door.holding import HoldLimits
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
                await until(lambda: rig.door.held.held() == ["web"])
                rig.task(f"t{number}", "web", ONE)
                await rig.apply()
            assert asked.result()["task"] == ONE
            del rig.endpoints[f"t{number}"]


async def test_a_websocket_is_held_and_keeps_the_service_from_being_idle(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE), rig.client() as session:
        rig.service("web", WEB)
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            opened = group.create_task(session.ws_connect("/", headers={"Host": "a.example"}))
            await until(lambda: rig.door.held.held() == ["web"])
            rig.task("t1", "web", ONE)
            await rig.apply()
        async with opened.result() as channel:
            await channel.send_str("held")
            assert await channel.receive_str(timeout=5) == "held again"
            await rig.door.watch_idle()
            await rig.door.watch_idle()
            assert rig.door.idle().keys() == {"web"}
            assert rig.door.held.open() == {"web": 1}


@pytest.mark.parametrize("is_former", [False, True])
async def test_only_a_service_without_requests_in_any_process_is_idle(
    directory: Path, is_former: bool
) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE), rig.client() as session:
        rig.service("web", WEB)
        rig.service("always", {"skep.http": "b.example", "skep.autoscale": "1..3"})
        rig.service("asleep", {"skep.http": "c.example", "skep.autoscale": "0..3"})
        rig.task("t1", "web", ONE)
        await rig.apply()
        assert rig.door.idle() == {}, "nothing is known before the first reading"

        async def idle_s(pause_s: float = 0.2) -> float:
            await rig.door.watch_idle()
            await asyncio.sleep(pause_s)
            await rig.door.watch_idle()
            idle: Mapping[ServiceId, float] = rig.door.idle()
            assert idle.keys() == {"web", "asleep"}
            return idle[ServiceId("web")]

        await idle_s()
        assert await idle_s() >= 0.2
        async with session.ws_connect("/", headers={"Host": "a.example"}) as channel:
            if is_former:
                rig.service("more", {"skep.http": "more.example"})
                await rig.apply()
            assert await idle_s() < 0.1, "an open WebSocket"
            await channel.send_str("x")
            assert await channel.receive_str(timeout=5) == "x again"
        await idle_s()
        await until_idle(rig)
        await rig.ask("a.example/")
        assert await idle_s(0) < 0.1, "a request since the last reading"
        rig.stop()
        await rig.door.watch_idle()
        assert rig.door.idle() == {}, "a HAProxy that does not respond may have requests"


async def test_a_reload_without_a_request_keeps_the_idle_time(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        rig.task("t1", "web", ONE)
        await rig.apply()
        await rig.ask("a.example/")
        await rig.door.watch_idle()
        await until_idle(rig)
        rig.service("more", {"skep.http": "more.example"})
        await rig.apply()
        await rig.door.watch_idle()
        assert rig.door.idle()[ServiceId("web")] >= 0.2
        await rig.door.watch_idle()
        assert rig.door.idle()[ServiceId("web")] >= 0.2
        await rig.ask("a.example/")  # the first one of the new process, as many as the former one had
        await rig.door.watch_idle()
        assert rig.door.idle()[ServiceId("web")] < 0.1
        await until_idle(rig)
        await rig.ask("a.example/")
        rig.service("again", {"skep.http": "again.example"})
        await rig.apply()
        await rig.door.watch_idle()
        assert rig.door.idle()[ServiceId("web")] < 0.2, "the former process had one right before the reload"


async def test_requests_without_a_task_do_not_keep_a_service_from_being_idle(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("away", {**WEB, "skep.http.redirect": "https"})
        rig.service("closed", {**WEB, "skep.http": "b.example", "skep.http.allow": "10.0.0.0/8"})
        rig.service("web", {**WEB, "skep.http": "c.example", "skep.http.rate": "1/m"})
        for number, name in enumerate(("away", "closed", "web")):
            rig.task(f"t{number}", name, ONE)
        await rig.apply()
        assert (await rig.ask("c.example/"))[0] == 200
        await rig.door.watch_idle()
        await asyncio.sleep(0.2)
        for host, status in (("a", 308), ("b", 403), ("c", 429)):
            assert (await rig.ask(f"{host}.example/"))[0] == status
        await rig.door.watch_idle()
        idle: Mapping[ServiceId, float] = rig.door.idle()
        assert idle.keys() == {"away", "closed", "web"}
        assert min(idle.values()) >= 0.2


async def until_idle(rig: DoorRig) -> None:
    async with asyncio.timeout(10):
        while rig.door.idle().get(ServiceId("web"), 0.0) < 0.2:
            await asyncio.sleep(0.05)
            await rig.door.watch_idle()


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
        await until(lambda: rig.door.held.held() == ["web"])
        writer.close()
        await until(lambda: rig.door.held.held() == [])


async def test_refused_requests_wake_nothing(directory: Path) -> None:
    async with a_door(directory) as rig:
        rig.service("closed", {**WEB, "skep.http.allow": "10.0.0.0/8"})
        rig.service("away", {**WEB, "skep.http": "b.example", "skep.http.redirect": "https"})
        rig.service("stopped", {"skep.http": "c.example"})
        await rig.apply()
        assert (await rig.ask("a.example/"))[0] == 403
        assert (await rig.ask("b.example/"))[0] == 308
        assert (await rig.ask("c.example/"))[0] == 503
        assert not rig.door.held.opened


async def test_held_requests_get_a_page_if_the_node_process_ends(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(rig.ask("a.example/"))
            await until(lambda: rig.door.held.held() == ["web"])
            rig.restart_node()
        status, _, headers = asked.result()
        assert (status, headers["Retry-After"]) == (503, "5")
        await rig.apply()
        async with asyncio.TaskGroup() as group:
            again = group.create_task(rig.ask_task("a.example/"))
            await until(lambda: rig.door.held.held() == ["web"])
            rig.task("t1", "web", ONE)
            await rig.apply()
        assert again.result()["task"] == ONE
