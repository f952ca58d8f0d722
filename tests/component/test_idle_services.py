"""For how long services had no request at a node's front door, as the node reports it and tells managers."""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from skep.aio.clock import SystemClock
from skep.manager.queries.node_questions import request_head
from skep.model.measures.readings import DOOR_IDLE
from skep.model.values.ids import ServiceId
from skep.node.container_access import TaskContainers
from skep.node.events import NodeEvents
from skep.wire import skep_pb2 as skep
from tests.component.test_held_requests import ONE, WEB, directory
from tests.component.test_one_exchange import OneContainer
from tests.support.networks.door_rig import DoorRig, a_door

__all__ = ["directory"]

pytestmark = pytest.mark.needs("haproxy", "root")


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
            await rig.door.read_statistics()
            await asyncio.sleep(pause_s)
            await rig.door.read_statistics()
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
        await rig.door.read_statistics()
        assert rig.door.idle() == {}, "a HAProxy that does not respond may have requests"


async def test_a_reload_without_a_request_keeps_the_idle_time(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("web", WEB)
        rig.task("t1", "web", ONE)
        await rig.apply()
        await rig.ask("a.example/")
        await rig.door.read_statistics()
        await until_idle(rig)
        rig.service("more", {"skep.http": "more.example"})
        await rig.apply()
        await rig.door.read_statistics()
        assert rig.door.idle()[ServiceId("web")] >= 0.2
        await rig.door.read_statistics()
        assert rig.door.idle()[ServiceId("web")] >= 0.2
        await rig.ask("a.example/")  # the first one of the new process, as many as the former one had
        await rig.door.read_statistics()
        assert rig.door.idle()[ServiceId("web")] < 0.1
        await until_idle(rig)
        asked_at = time.monotonic()
        await rig.ask("a.example/")
        rig.service("again", {"skep.http": "again.example"})
        await rig.apply()
        await rig.door.read_statistics()
        since_s = time.monotonic() - asked_at
        assert rig.door.idle()[ServiceId("web")] <= since_s, (
            "the former process had one right before the reload"
        )


async def test_requests_without_a_task_do_not_keep_a_service_from_being_idle(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE):
        rig.service("away", {**WEB, "skep.http.redirect": "https"})
        rig.service("closed", {**WEB, "skep.http": "b.example", "skep.http.allow": "10.0.0.0/8"})
        rig.service("web", {**WEB, "skep.http": "c.example", "skep.http.rate": "1/m"})
        for number, name in enumerate(("away", "closed", "web")):
            rig.task(f"t{number}", name, ONE)
        await rig.apply()
        assert (await rig.ask("c.example/"))[0] == 200
        await rig.door.read_statistics()
        await asyncio.sleep(0.2)
        for host, status in (("a", 308), ("b", 403), ("c", 429)):
            assert (await rig.ask(f"{host}.example/"))[0] == status
        await rig.door.read_statistics()
        idle: Mapping[ServiceId, float] = rig.door.idle()
        assert idle.keys() == {"away", "closed", "web"}
        assert min(idle.values()) >= 0.2


async def until_idle(rig: DoorRig) -> None:
    async with asyncio.timeout(10):
        while rig.door.idle().get(ServiceId("web"), 0.0) < 0.2:
            await asyncio.sleep(0.05)
            await rig.door.read_statistics()


async def test_a_manager_reads_a_websocket_that_has_just_begun(directory: Path) -> None:
    async with a_door(directory) as rig, rig.tasks(ONE), rig.client() as session:
        rig.service("web", WEB)
        rig.task("t1", "web", ONE)
        await rig.apply()
        access = TaskContainers(cast("Any", OneContainer()), NodeEvents(SystemClock()), rig.door)

        async def read_idle_s() -> float:
            connection = await access.connect(skep.TunnelRequest(head=request_head("GET", DOOR_IDLE)))
            found = b""
            while part := await connection.read():
                found += part
            connection.abort()
            return float(json.loads(found.partition(b"\r\n\r\n")[2])["web"])

        async with access.serving():
            await read_idle_s()
            await until_idle(rig)
            assert await read_idle_s() > 0
            async with session.ws_connect("/", headers={"Host": "a.example"}):
                assert rig.door.idle()[ServiceId("web")] > 0, "as a report says that was read before"
                assert await read_idle_s() == 0
