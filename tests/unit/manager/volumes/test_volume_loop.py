"""The loop over cluster volumes: one driver holds up no other volume, and errors are shown where they belong."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import FailedPrecondition, NotFound, Unavailable
from skep.manager.control.nodes import remove_node
from skep.manager.control.volumes import remove_volume
from skep.manager.volumes.driver_calls import ControllerDriver
from skep.manager.volumes.loop import VolumeManager
from skep.manager.volumes.state import SETTLED_S, VolumesState
from skep.manager.volumes.steps import REMOVED_S
from skep.model.node import CSIInfo, NodeState
from skep.model.secret import Secret
from skep.model.task import Task, TaskState, TaskStatus, VolumeAttachment
from skep.model.values.ids import NodeId, SecretId, TaskId, VolumeId
from skep.model.values.meta import Driver
from skep.model.volume import (
    AccessMode,
    CapacityRange,
    PublishState,
    PublishStatus,
    TypeMount,
    Volume,
    VolumeInfo,
    VolumeScope,
    VolumeSecret,
    VolumeSharing,
    VolumeSpec,
)
from skep.store.interface import NotLeader, Transaction
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore
from tests.support.builders import a_node
from tests.support.managers.counted_calls import calls_of


class FakeDriver:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.given: Mapping[str, str] = {}
        self.ids = iter(f"disk-{number}" for number in range(100))
        self.capacity = 0
        self.error: Exception | None = None
        self.hangs = False
        self.answers_after_s = 0.0
        self.hangs_on: frozenset[str] = frozenset()
        self.is_elsewhere = False

    async def create(self, volume: Volume, secrets: Mapping[str, str]) -> VolumeInfo:
        self.calls.append(volume.spec.name)
        self.given = secrets
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.answers_after_s)
        return VolumeInfo(volume_id=next(self.ids), capacity_bytes=self.capacity)

    async def delete(self, volume_id: str, secrets: Mapping[str, str]) -> None:
        self.calls.append(f"delete {volume_id}")

    async def publish(
        self, volume: Volume, driver_node_id: str, secrets: Mapping[str, str]
    ) -> Mapping[str, str]:
        self.calls.append(f"publish on {driver_node_id}")
        if driver_node_id in self.hangs_on:
            await asyncio.Event().wait()
        if self.is_elsewhere:
            raise FailedPrecondition("it is published on another node")
        return {}

    async def unpublish(self, volume_id: str, driver_node_id: str, secrets: Mapping[str, str]) -> None:
        self.calls.append(f"unpublish on {driver_node_id}")


class Rig:
    def __init__(self, loop: VirtualLoop) -> None:
        self.clock = VirtualClock(loop)
        self.store = MemoryStore(self.clock)
        self.is_deposed = False
        self.drivers = {"good": FakeDriver(), "bad": FakeDriver()}

    async def find(self, name: str) -> ControllerDriver:
        if name not in self.drivers:
            raise NotFound(f'driver "{name}" not found')
        return self.drivers[name]

    async def put(self, name: str, driver: str = "good", **fields: Any) -> None:
        spec = VolumeSpec(name=name, driver=Driver(name=driver), **fields)
        await self.store.update(lambda tx: tx.put(Volume(id=VolumeId(name), spec=spec)))

    async def confirm(self) -> None:
        if self.is_deposed:
            raise NotLeader

    def volume(self, name: str) -> Volume:
        return self.store.view().get(Volume, name)

    async def run_for(self, seconds: float) -> None:
        volumes = VolumeManager(self.store, self.clock, Random(1), self.find, self.confirm)
        running = asyncio.ensure_future(volumes.run())
        await self.clock.sleep(seconds)
        running.cancel()
        await asyncio.wait([running])


Body = Callable[[Rig], Coroutine[Any, Any, None]]


@pytest.fixture
def simulated() -> Callable[[Body], None]:
    def run(body: Body) -> None:
        loop = VirtualLoop()
        try:
            loop.run_until_complete(body(Rig(loop)))
        finally:
            loop.close()

    return run


def test_a_driver_that_hangs_or_fails_holds_up_no_other_volume(simulated: Callable[[Body], None]) -> None:
    async def body(rig: Rig) -> None:
        rig.drivers["bad"].hangs = True
        await rig.put("a", "bad")
        await rig.put("b", "none")
        await rig.put("c", "good")
        await rig.run_for(5)
        assert rig.volume("c").info == VolumeInfo(volume_id="disk-0")
        assert (rig.volume("a").info, rig.volume("a").is_creating) == (None, True)
        assert rig.volume("b").message == 'driver "none" not found'
        assert not rig.volume("b").is_creating

    simulated(body)


def test_a_change_of_a_node_concerns_the_volumes_on_it_and_no_others(
    simulated: Callable[[Body], None],
) -> None:
    async def body(rig: Rig) -> None:
        n1, n2 = a_node("n1"), a_node("n2")
        await rig.store.update(lambda tx: (tx.put(n1), tx.put(n2)))
        for number in range(20):
            await rig.put(f"other{number}")
        running = asyncio.ensure_future(rig.run_for(20))
        await rig.clock.sleep(5)
        # Doubtful, so that it stays: its node has to unmount it.
        there = PublishStatus(node_id=n1.id, state=PublishState.PENDING_NODE_UNPUBLISH, is_doubtful=True)
        on_n1 = replace(rig.volume("other7"), publish_status=(there,))
        await rig.store.update(lambda tx: tx.put(on_n1))
        await rig.clock.sleep(5)
        find = type(rig.store.view()).find
        for node in (n2, n1):
            down = replace(node, status=replace(node.status, state=NodeState.DOWN))
            with calls_of(VolumesState.needed_on, find) as calls:
                await rig.store.update(lambda tx, down=down: tx.put(down))
                await rig.clock.sleep(0.1)
            looked = [call["id"] for call in calls.of(VolumesState.needed_on)]
            assert looked == (["other7"] if node is n1 else [])
            assert Volume not in [call["kind"] for call in calls.of(find)], "all volumes were looked at"
        await running

    simulated(body)


def test_failures_are_tried_again_ever_more_rarely_and_shown_until_they_end(
    simulated: Callable[[Body], None],
) -> None:
    async def body(rig: Rig) -> None:
        driver = rig.drivers["good"]
        driver.error = Unavailable("no room")
        await rig.put("a")
        await rig.run_for(120)
        assert 4 <= len(driver.calls) <= 15
        assert rig.volume("a").message == "no room"
        driver.error = ValueError("a defect of ours")
        await rig.run_for(5)
        assert "a defect of ours" in rig.volume("a").message
        driver.error = None
        await rig.run_for(60)
        assert (rig.volume("a").message, rig.volume("a").is_creating) == ("", False)
        assert rig.volume("a").info is not None

    simulated(body)


def test_what_is_not_as_asked_is_kept_until_it_is_removed_and_another_volumes_id_is_not_taken(
    simulated: Callable[[Body], None],
) -> None:
    async def body(rig: Rig) -> None:
        driver = rig.drivers["good"]
        driver.capacity = 5
        await rig.put("small", capacity_range=CapacityRange(required_bytes=9))
        await rig.run_for(0.5)
        # Drivers find volumes by name: it may be one with data, of before.
        assert driver.calls == ["small"]
        assert "9 are required; removing the volume deletes it" in rig.volume("small").message
        await rig.store.update(remove_volume, VolumeId("small"), force=False)
        await rig.run_for(SETTLED_S + 60)
        assert driver.calls[-1].startswith("delete disk-")
        assert not rig.store.view().find(Volume)
        await rig.put("a")
        driver.capacity = 0
        driver.ids = iter(["same", "same"])
        driver.calls.clear()
        await rig.run_for(0.2)
        await rig.put("b")
        driver.ids = iter(["same"] * 9)
        await rig.run_for(0.2)
        assert "the id of volume a: same" in rig.volume("b").message
        assert "delete same" not in driver.calls[driver.calls.index("b") :]

    simulated(body)


def test_drivers_get_the_data_of_secrets(simulated: Callable[[Body], None]) -> None:
    async def body(rig: Rig) -> None:
        secret = Secret(id=SecretId("s1"))
        await rig.store.update(
            lambda tx: (
                tx.put(replace(secret, spec=replace(secret.spec, name="pass"))),
                tx.put(Payload(id="secret/s1", data=b"word")),
            )
        )
        await rig.put("a", secrets=(VolumeSecret(key="k", secret="s1"),))
        await rig.run_for(1)
        assert rig.drivers["good"].given == {"k": "word"}

    simulated(body)


def test_of_volumes_that_are_given_one_id_at_the_same_time_one_gets_it(
    simulated: Callable[[Body], None],
) -> None:
    async def body(rig: Rig) -> None:
        rig.drivers["good"].ids = iter(["same"] * 100)
        rig.drivers["good"].answers_after_s = 1.0
        await rig.put("a")
        await rig.put("b")
        await rig.run_for(10)
        infos = [rig.volume(name).info for name in "ab"]
        assert sorted(infos, key=bool) == [None, VolumeInfo(volume_id="same")]

    simulated(body)


def test_a_volume_whose_places_cannot_be_read_is_left_as_it_is(simulated: Callable[[Body], None]) -> None:
    async def body(rig: Rig) -> None:
        await rig.put("a")
        await rig.run_for(5)
        task = Task(
            id=TaskId("t1"),
            node_id=NodeId("n2"),
            volumes=(VolumeAttachment(id="a", source="a", target="/d"),),
            status=TaskStatus(state=TaskState.ASSIGNED),
        )
        await rig.store.update(lambda tx: tx.put(task))
        before = rig.volume("a")
        table = rig.store.view().damaged(Volume)
        assert isinstance(table, dict)
        table["a"] = {"publish": "rotten"}  # it may be on n1
        await rig.run_for(60)
        after = rig.volume("a")
        assert after.publish_status == before.publish_status == ()
        assert "where the volume is published is unreadable" in after.message

    simulated(body)


def test_a_node_for_which_a_call_hangs_holds_up_no_other_node(simulated: Callable[[Body], None]) -> None:
    async def body(rig: Rig) -> None:
        rig.drivers["good"].hangs_on = frozenset(("n1", "n2", "n3"))
        mode = AccessMode(scope=VolumeScope.MULTI, sharing=VolumeSharing.ALL, mount_volume=TypeMount())
        await rig.put("a", access_mode=mode)
        await rig.run_for(1)
        for number in range(1, 6):
            await rig.store.update(_with_task, f"n{number}")
        await rig.run_for(1)
        statuses = {one.node_id: one.state for one in rig.volume("a").publish_status}
        published = [id for id, state in statuses.items() if state is PublishState.PUBLISHED]
        assert (len(statuses), published) == (5, ["n4", "n5"])

    simulated(body)


def test_what_an_earlier_leader_may_be_doing_is_repeated_and_not_undone(
    simulated: Callable[[Body], None],
) -> None:
    async def body(rig: Rig) -> None:
        driver = rig.drivers["good"]
        driver.hangs_on = frozenset(("n1",))
        await rig.put("a")
        await rig.run_for(5)
        await rig.store.update(_with_task, "n1")
        await rig.run_for(5)
        assert driver.calls[-1] == "publish on n1"
        driver.calls.clear()
        await rig.run_for(5)
        assert driver.calls == ["publish on n1"], "the next leader repeats it"
        await rig.store.update(lambda tx: tx.delete(Task, TaskId("t-n1")))
        await rig.put("new")
        await rig.run_for(SETTLED_S - 1)
        assert not [call for call in driver.calls if call.startswith("unpublish")]
        assert [one.message for one in rig.volume("a").publish_status] == [
            "waiting until no call of an earlier leader can be in progress"
        ]
        assert rig.volume("new").info is not None
        await rig.run_for(SETTLED_S + 1)
        assert "unpublish on n1" in driver.calls
        assert rig.volume("a").publish_status == ()

    simulated(body)


@pytest.mark.parametrize("scope", VolumeScope)
def test_a_volume_for_one_node_is_taken_from_a_removed_node_once_its_containers_have_stopped(
    simulated: Callable[[Body], None], scope: VolumeScope
) -> None:
    async def body(rig: Rig) -> None:
        volumes = VolumeManager(rig.store, rig.clock, Random(1), rig.find, rig.confirm)
        running = asyncio.ensure_future(volumes.run())
        mode = AccessMode(scope=scope, sharing=VolumeSharing.ALL, mount_volume=TypeMount())
        await rig.put("a", access_mode=mode)
        await rig.clock.sleep(1)
        await rig.store.update(_with_task, "n1")
        await rig.clock.sleep(1)
        assert [one.state for one in rig.volume("a").publish_status] == [PublishState.PUBLISHED]

        def remove(tx: Transaction) -> None:
            remove_node(tx, NodeId("n1"), force=True, now_ns=rig.clock.now_ns())
            tx.delete(Task, TaskId("t-n1"))

        await rig.store.update(remove)
        await rig.clock.sleep(REMOVED_S - 1)
        waits = scope is VolumeScope.SINGLE
        assert ("unpublish on n1" in rig.drivers["good"].calls) is not waits
        messages = [one.message for one in rig.volume("a").publish_status]
        assert messages == (["waiting until the removed node has stopped its containers"] if waits else [])
        await rig.clock.sleep(2)
        assert "unpublish on n1" in rig.drivers["good"].calls
        assert rig.volume("a").publish_status == ()
        running.cancel()
        await asyncio.wait([running])

    simulated(body)


def test_a_clock_that_is_set_back_does_not_prolong_the_wait_for_a_removed_node(
    simulated: Callable[[Body], None],
) -> None:
    async def body(rig: Rig) -> None:
        volumes = VolumeManager(rig.store, rig.clock, Random(1), rig.find, rig.confirm)
        running = asyncio.ensure_future(volumes.run())
        mode = AccessMode(scope=VolumeScope.SINGLE, sharing=VolumeSharing.ALL, mount_volume=TypeMount())
        await rig.put("a", access_mode=mode)
        await rig.clock.sleep(1)
        await rig.store.update(_with_task, "n1")
        await rig.clock.sleep(1)

        def remove(tx: Transaction) -> None:
            remove_node(tx, NodeId("n1"), force=True, now_ns=rig.clock.now_ns())
            tx.delete(Task, TaskId("t-n1"))

        await rig.store.update(remove)
        rig.clock.wall_off_s = -3600.0
        await rig.clock.sleep(REMOVED_S - 1)
        assert "unpublish on n1" not in rig.drivers["good"].calls
        await rig.clock.sleep(2)
        assert rig.volume("a").publish_status == ()
        running.cancel()
        await asyncio.wait([running])

    simulated(body)


def test_a_volume_of_this_term_is_deleted_at_once(simulated: Callable[[Body], None]) -> None:
    async def body(rig: Rig) -> None:
        async def user() -> None:
            await rig.clock.sleep(1)
            await rig.put("a")
            await rig.clock.sleep(2)
            await rig.store.update(remove_volume, VolumeId("a"), force=False)

        asked = asyncio.ensure_future(user())
        await rig.run_for(10)
        await asked
        assert rig.drivers["good"].calls == ["a", "delete disk-0"]

    simulated(body)


def test_a_deposed_leader_asks_nothing_of_a_driver(simulated: Callable[[Body], None]) -> None:
    async def body(rig: Rig) -> None:
        rig.is_deposed = True
        await rig.put("a")
        await rig.run_for(5)
        assert rig.drivers["good"].calls == []

    simulated(body)


def test_all_nodes_are_asked_for_a_volume_that_its_driver_has_on_another_one(
    simulated: Callable[[Body], None],
) -> None:
    """Also if an earlier call of the term was refused with the same code."""

    async def body(rig: Rig) -> None:
        driver = rig.drivers["good"]

        async def user() -> None:
            driver.error = FailedPrecondition("not now")
            await rig.put("a")
            await rig.clock.sleep(1)
            driver.error, driver.is_elsewhere = None, True
            await rig.store.update(_with_node, "n2")
            await rig.store.update(_with_task, "n1")

        asked = asyncio.ensure_future(user())
        await rig.run_for(60)
        await asked
        assert {one.node_id: one.state for one in rig.volume("a").publish_status} == {
            "n1": PublishState.PENDING,
            "n2": PublishState.PENDING_NODE_UNPUBLISH,
        }

    simulated(body)


def test_no_node_is_asked_for_a_volume_of_which_a_secret_is_missing(
    simulated: Callable[[Body], None],
) -> None:
    async def body(rig: Rig) -> None:
        payload = Payload(id="secret/s1", data=b"word")
        await rig.store.update(lambda tx: (tx.put(Secret(id=SecretId("s1"))), tx.put(payload)))
        await rig.put("a", secrets=(VolumeSecret(key="k", secret="s1"),))
        await rig.run_for(5)
        await rig.store.update(lambda tx: tx.delete(Payload, "secret/s1"))
        await rig.store.update(_with_node, "n2")
        await rig.store.update(_with_task, "n1")
        await rig.run_for(60)
        (status,) = rig.volume("a").publish_status
        assert (status.node_id, status.message) == ("n1", "secret s1 of the volume cannot be read")
        await rig.store.update(lambda tx: tx.put(payload))
        await rig.run_for(60)
        assert [one.state for one in rig.volume("a").publish_status] == [PublishState.PUBLISHED]

    simulated(body)


def _with_node(tx: Transaction, node_id: str) -> None:
    node = a_node(node_id)
    info = CSIInfo(plugin_name="good", node_id=node_id)
    tx.put(replace(node, description=replace(node.description, csi_info=(info,))))


def _with_task(tx: Transaction, node_id: str) -> None:
    _with_node(tx, node_id)
    volumes = (VolumeAttachment(id="a", source="a", target="/d"),)
    status = TaskStatus(state=TaskState.ASSIGNED)
    tx.put(Task(id=TaskId(f"t-{node_id}"), node_id=NodeId(node_id), volumes=volumes, status=status))
