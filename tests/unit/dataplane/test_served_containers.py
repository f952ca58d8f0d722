"""Containers of the net process: one whose namespace refuses or hangs keeps no other network from its changes."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from skep.dataplane.net_process.protocol import ContainerEndpoint, Named
from skep.dataplane.net_process.served_container import ContainerRecord
from skep.dataplane.net_process.served_containers import ServedContainers
from skep.dataplane.vip.virtual_addresses import redirect_unaccepted
from skep.errors import Unavailable
from skep.model.networks.tables import NetworkHead, NetworkTable, TableEndpoint, TableService
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.paths import Paths
from tests.support.engine.oci_rig import QuickClock

FIRST, SECOND, WEB = NetworkId("first"), NetworkId("second"), ServiceId("web")


class Spaces:
    """Namespaces of which some refuse, or hang in a thread, which cannot be interrupted."""

    writer = "skep-1"

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.hanging: dict[str, asyncio.Event] = {}
        self.written: list[str] = []
        self.inside: list[str] = []
        self.inside_max = 0
        self.attempts = Counter[str]()
        self.redirected = Counter[str]()
        self._moved = asyncio.Event()

    async def run(self, namespace: Path, work: Callable[..., Any], *_: Any) -> None:
        self.redirected[namespace.name] += work is redirect_unaccepted
        await asyncio.shield(asyncio.ensure_future(self._thread(namespace.name)))

    async def _thread(self, name: str) -> None:
        self.inside.append(name)
        self.attempts[name] += 1
        self.inside_max = max(self.inside_max, self.inside.count(name))
        try:
            if (end := self.hanging.get(name)) is not None:
                await end.wait()
            if name in self.refused:
                raise Unavailable("the kernel refuses")
            self.written.append(name)
        finally:
            self.inside.remove(name)
            self._moved.set()

    async def wait(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._moved.clear()
                await self._moved.wait()


def write(paths: Paths, id: NetworkId, *backends: str) -> None:
    """Write the table of a network with the service ``web`` and these backends."""
    service = TableService(id=WEB, name="web", virtual_ips=("10.5.0.2",))
    endpoints = {
        TaskId(one): TableEndpoint(
            task_id=TaskId(one), node_id=NodeId("n"), service_id=WEB, addresses=(one,), is_serving=True
        )
        for one in backends
    }
    table = NetworkTable(head=NetworkHead(id=id, name=id), services={WEB: service}, endpoints=endpoints)
    (paths.tables / id).write_bytes(msgspec.msgpack.encode(table))


@pytest.fixture
def spaces() -> Spaces:
    return Spaces()


@pytest.fixture
def serving(tmp_path: Path, spaces: Spaces) -> ServedContainers:
    """``both`` is on both networks and uses a service of the first one, ``one`` is on the second one and uses its."""
    paths = Paths(tmp_path / "data", tmp_path / "run")
    paths.tables.mkdir(parents=True)
    for id in (FIRST, SECOND):
        write(paths, id)
    made = ServedContainers(
        paths,
        cast("Any", spaces),
        clock=QuickClock(),
        rng=lambda: 0.5,
        new_id=lambda: 1,
        start_task=asyncio.ensure_future,  # type: ignore[arg-type]
    )
    for id, networks, used in (("both", (FIRST, SECOND), FIRST), ("one", (SECOND,), SECOND)):
        (tmp_path / id).touch()
        named = Named(id=id, netns=str(tmp_path / id), networks=tuple(map(ContainerEndpoint, networks)))
        made.served[id] = made.new_served(ContainerRecord(named, loaded=((used, WEB),)))
    return made


async def test_a_refusing_container_fails_only_changes_of_networks_whose_addresses_it_uses(
    serving: ServedContainers, spaces: Spaces
) -> None:
    spaces.refused.add("both")
    with capture_logs():
        with pytest.raises(Unavailable, match="1 of 1 containers do not have the new virtual addresses yet"):
            await serving.refresh([FIRST])
        await serving.refresh([SECOND])
        assert spaces.written == ["one"]
        spaces.refused.clear()
        await spaces.wait(lambda: "both" in spaces.written)
        await serving.refresh([FIRST])


async def test_a_container_that_is_behind_is_brought_up_to_date_by_a_change_of_another_network(
    serving: ServedContainers, spaces: Spaces
) -> None:
    await serving.refresh([SECOND])
    await spaces.wait(lambda: sorted(spaces.written) == ["both", "one"])


async def test_what_keeps_a_container_from_being_written_is_logged_once(
    serving: ServedContainers, spaces: Spaces
) -> None:
    spaces.refused.add("both")
    with capture_logs() as logs:
        await serving.refresh([SECOND])
        await spaces.wait(lambda: spaces.attempts["both"] > 5)
        spaces.refused.clear()
        await spaces.wait(lambda: "both" in spaces.written)
    assert [(one["container"], one["reason"]) for one in logs] == [("both", "the kernel refuses")]


async def test_a_hanging_container_holds_up_no_other_network_and_is_written_by_one_thread_at_a_time(
    serving: ServedContainers, spaces: Spaces
) -> None:
    ends = spaces.hanging["both"] = asyncio.Event()
    tasks = []
    for _ in range(3):
        with pytest.raises(Unavailable, match="1 of 1 containers do not have"):
            await serving.refresh([FIRST], within_s=0.01)
        await serving.refresh([SECOND], within_s=0.01)
        tasks.append(len(asyncio.all_tasks()))
    assert spaces.written == ["one"]
    assert tasks[0] == tasks[-1], "none pile up behind it"
    ends.set()
    await spaces.wait(lambda: "both" in spaces.written)
    assert spaces.inside_max == 1
    await serving.refresh([FIRST])


async def test_lost_backends_redirect_connections_once_in_each_container_that_uses_the_address(
    serving: ServedContainers, spaces: Spaces, tmp_path: Path
) -> None:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    for backends in ((), ("10.5.0.7",), ("10.5.0.7", "10.5.0.8", "10.5.0.9")):
        write(paths, FIRST, *backends)
        await serving.refresh([FIRST, SECOND])
    await asyncio.sleep(0)
    assert not spaces.redirected.total(), "no backend was lost"
    for backends in (("10.5.0.7", "10.5.0.8"), ("10.5.0.7",)):
        write(paths, FIRST, *backends)
        await serving.refresh([FIRST])
    await spaces.wait(lambda: spaces.redirected.total())
    assert spaces.redirected == Counter({"both": 1})
    spaces.refused.add("both")
    write(paths, FIRST, "10.5.0.8")
    with pytest.raises(Unavailable):
        await serving.refresh([FIRST])
    spaces.refused.clear()
    await serving.refresh([FIRST])
    write(paths, FIRST)
    await serving.refresh([FIRST])
    await spaces.wait(lambda: spaces.redirected["both"] == 2)
