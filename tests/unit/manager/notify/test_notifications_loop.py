"""The loop over notifications, on an in-memory store and virtual time: each incident is told once by every leader."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.notify.incidents import REMIND_NS, RESOLVE_S, SETTLE_S
from skep.manager.notify.loop import Notifications
from skep.manager.notify.messages import Message
from skep.manager.notify.problems import BACKUP_DAYS
from skep.manager.notify.records import (
    Target,
    delivery_id,
    delivery_in,
    incidents_in,
    note_backup,
    targets_in,
)
from skep.manager.notify.writing import add_target, remove_target
from skep.model.node import Node, NodeCertificate, NodeState
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from skep.model.options.notifications import Topic
from skep.model.service import UpdateState, UpdateStatus
from skep.model.swarm import Swarm, SwarmSpec
from skep.model.task import TaskState
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.interface import Transaction
from skep.store.kinds import Payload
from skep.store.level import LEVEL
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.store.damage_rigs import damage

DAY_S = 86_400.0


class Rig:
    """A cluster with two nodes, and receivers that note what arrives."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        asyncio.set_event_loop(self.loop)
        self.clock = VirtualClock(self.loop)
        self.store = MemoryStore(self.clock)
        self.messages: list[tuple[str, Message]] = []
        self.failing: dict[str, str] = {}
        self.hanging: set[str] = set()
        self.broken: set[str] = set()
        self.takes_s = 0.1

    async def send(self, target: Target, message: Message) -> str:
        if target.name in self.broken:
            raise RuntimeError("a defect")
        if target.name in self.hanging:
            await asyncio.sleep(20)
            return "it did not respond within 20 s"
        await asyncio.sleep(self.takes_s / 2)
        if (reason := self.failing.get(target.name, "")) == "":
            self.messages.append((target.name, message))
        await asyncio.sleep(self.takes_s / 2)
        return reason

    async def confirm(self) -> None:
        pass

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[None]:
        """Run the loop of one leader.  At the end it is gone, as if its machine had lost power."""
        loop = Notifications(self.store, self.clock, Random(1), self.send, self.confirm)
        running = asyncio.create_task(loop.run())
        try:
            yield
            assert not running.done(), running
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def found(self, *targets: Target) -> None:
        def write(tx: Transaction) -> None:
            tx.raise_level(LEVEL)
            created_at = timestamp(self.clock.now_ns())
            tx.put(Swarm(id=ClusterId("c1"), created_at=created_at, spec=SwarmSpec(name="default")))
            for id in ("n1", "n2"):
                tx.put(a_node(id))
            for target in targets:
                add_target(tx, replace(target, created_ns=self.clock.now_ns()))

        await self.store.update(write)

    async def set_node(self, id: str, state: NodeState, *, is_full: bool = False) -> None:
        def write(tx: Transaction) -> None:
            node = tx.get(Node, NodeId(id))
            labels = {DISK_PRESSURE_LABEL: "disk / is full"} if is_full else {}
            engine = replace(node.description.engine, labels=labels)
            description = replace(node.description, engine=engine)
            tx.put(replace(node, description=description, status=replace(node.status, state=state)))

        await self.store.update(write)

    def told(self, name: str = "ops") -> list[str]:
        """Return the lines about incidents that a receiver keeps, if it drops a message whose id it knows."""
        known = {message.id: message for target, message in self.messages if target == name}
        return [
            f"{one.status} {one.incident.message}" for message in known.values() for one in message.notices
        ]

    def run(self, body: Callable[[], Awaitable[None]]) -> None:
        async def live() -> None:
            await body()

        self.loop.run_until_complete(live())


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.loop.close()
    asyncio.set_event_loop(None)


def a_target(name: str = "ops", **fields: object) -> Target:
    return Target(id=f"id-{name}", name=name, url="https://example.org/", **fields)  # type: ignore[arg-type]


def test_a_target_whose_name_has_a_full_stop_is_told(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target("ops.mail"))
        async with rig.leading():
            await rig.set_node("n1", NodeState.DOWN)
            await asyncio.sleep(600)
            assert rig.told("ops.mail") == ["began node n1 is down"]

    rig.run(body)


def test_a_node_that_goes_and_returns_is_told_once_each(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target())
        async with rig.leading():
            await asyncio.sleep(60)
            assert rig.messages == []
            await rig.set_node("n1", NodeState.DOWN)
            await asyncio.sleep(SETTLE_S - 1)
            assert rig.messages == []
            await asyncio.sleep(600)
            assert rig.told() == ["began node n1 is down"]
            await rig.set_node("n1", NodeState.READY)
            await asyncio.sleep(600)
            assert rig.told() == ["began node n1 is down", "ended node n1 is down"]
            assert len(rig.messages) == 2

    rig.run(body)


def test_a_node_that_is_back_within_seconds_is_not_told(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target())
        async with rig.leading():
            for _ in range(20):
                await rig.set_node("n1", NodeState.DOWN)
                await asyncio.sleep(SETTLE_S / 2)
                await rig.set_node("n1", NodeState.READY)
                await asyncio.sleep(SETTLE_S / 2)
            await asyncio.sleep(600)
            assert rig.messages == []

    rig.run(body)


def test_a_node_that_comes_and_goes_is_one_incident(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target())
        async with rig.leading():
            for _ in range(20):
                await rig.set_node("n1", NodeState.DOWN)
                await asyncio.sleep(SETTLE_S * 2)
                await rig.set_node("n1", NodeState.READY)
                await asyncio.sleep(RESOLVE_S / 2)
            await asyncio.sleep(600)
            assert rig.told() == ["began node n1 is down", "ended node n1 is down"]

    rig.run(body)


def test_what_begins_together_is_one_message(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target())
        await rig.store.update(lambda tx: tx.put(a_service("web", state=UpdateState.PAUSED)))
        async with rig.leading():
            await rig.set_node("n2", NodeState.READY, is_full=True)
            await asyncio.sleep(2)
            await rig.set_node("n1", NodeState.DOWN)
            await asyncio.sleep(60)
            assert len(rig.messages) == 1
            assert sorted(rig.told()) == [
                "began node n1 is down",
                "began node n2: disk / is full",
                "began update of service web was paused",
            ]

    rig.run(body)


def test_targets_are_told_what_they_want_and_a_hanging_one_delays_nobody(rig: Rig) -> None:
    async def body() -> None:
        rig.hanging = {"hangs"}
        await rig.found(
            a_target("disks", topics=(Topic.DISK,)),
            a_target("hangs"),
            a_target("shop", stacks=("shop",)),
            a_target("zzz"),
        )
        labels = {"com.docker.stack.namespace": "shop"}
        spec = replace(a_service("shop_web").spec, labels=labels)
        service = replace(a_service("shop_web", state=UpdateState.ROLLBACK_COMPLETED), spec=spec)
        await rig.store.update(lambda tx: tx.put(service))
        async with rig.leading():
            await rig.set_node("n1", NodeState.DOWN, is_full=True)
            await asyncio.sleep(30)
            assert rig.told("disks") == ["began node n1: disk / is full"]
            assert rig.told("shop") == ["began update of service shop_web was rolled back"]
            assert len(rig.told("zzz")) == 3
            await asyncio.sleep(300)
            view = rig.store.view()
            hanging = delivery_in(view, targets_in(view)[1])
            assert hanging is not None
            assert hanging.error == "it did not respond within 20 s"
            assert hanging.failed > 2
            rig.hanging.clear()
            await asyncio.sleep(600)
            assert len(rig.told("hangs")) == 3

    rig.run(body)


def test_a_defect_in_sending_or_in_a_record_neither_ends_the_loop_nor_concerns_others(rig: Rig) -> None:
    async def body() -> None:
        rig.broken = {"bad"}
        await rig.found(a_target("bad"), a_target("ops"))
        rotten = Payload(id=delivery_id("bad"), data=b"{")
        await rig.store.update(lambda tx: tx.put(rotten))
        async with rig.leading():
            await rig.set_node("n1", NodeState.DOWN)
            await asyncio.sleep(120)
            assert rig.told() == ["began node n1 is down"]
            view = rig.store.view()
            bad = delivery_in(view, targets_in(view)[0])
            assert bad is not None
            assert bad.error == "internal error: see the log of the leader"
            rig.broken.clear()
            await asyncio.sleep(600)
            assert rig.told("bad") == ["began node n1 is down"]

    rig.run(body)


def test_a_deploy_that_fails_again_is_told_again(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target(topics=(Topic.DEPLOY,)))
        states = (UpdateState.PAUSED, UpdateState.UPDATING) * 2 + (UpdateState.COMPLETED,)
        async with rig.leading():
            for state in states:
                status = UpdateStatus(state=state, message="update paused due to failure")
                await rig.store.update(
                    lambda tx, status=status: tx.put(replace(a_service("web"), update_status=status))
                )
                await asyncio.sleep(120)
            words = "update of service web was paused: update paused due to failure"
            assert rig.told() == [f"began {words}", f"ended {words}"] * 2

    rig.run(body)


def test_an_incident_that_lasts_is_told_again_every_day(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target(topics=(Topic.NODE,)))
        await rig.set_node("n1", NodeState.DOWN)
        async with rig.leading():
            await asyncio.sleep(REMIND_NS / SECOND_NS * 2.5)
        assert rig.told() == ["began node n1 is down", *["reminder node n1 is down"] * 2]

    rig.run(body)


def test_nobody_is_reminded_of_a_rollback_that_is_over_and_took_a_while(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target(topics=(Topic.DEPLOY,)))
        async with rig.leading():
            for state, seconds in (
                (UpdateState.ROLLBACK_STARTED, 120.0),
                (UpdateState.ROLLBACK_COMPLETED, REMIND_NS / SECOND_NS * 2.5),
            ):
                status = UpdateStatus(state=state)
                await rig.store.update(
                    lambda tx, status=status: tx.put(replace(a_service("web"), update_status=status))
                )
                await asyncio.sleep(seconds)
        assert rig.told() == ["began update of service web is being rolled back"]

    rig.run(body)


def test_a_reminder_is_about_the_present_state(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target(topics=(Topic.DEPLOY,)))
        async with rig.leading():
            for state in (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED):
                status = UpdateStatus(state=state)
                await rig.store.update(
                    lambda tx, status=status: tx.put(replace(a_service("web"), update_status=status))
                )
                await asyncio.sleep(0.75 * REMIND_NS / SECOND_NS)
        assert rig.told() == [
            "began update of service web was paused",
            "reminder update of service web was rolled back, and the rollback was paused",
        ]

    rig.run(body)


def test_a_certificate_that_is_not_renewed_is_told_until_it_is(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target(topics=(Topic.CERTIFICATE,)))

        async def set_days(days: int) -> None:
            until = timestamp(rig.clock.now_ns() + days * round(DAY_S) * SECOND_NS)
            certificate = NodeCertificate(not_after=until)
            await rig.store.update(lambda tx: tx.put(replace(tx.get(Node, "n1"), certificate=certificate)))

        async with rig.leading():
            await set_days(80)
            await asyncio.sleep(DAY_S / 2)
            assert rig.told() == []
            await set_days(10)
            await asyncio.sleep(DAY_S / 2)
            (began,) = rig.told()
            assert began.startswith("began the certificate of node n1 expires on ")
            await set_days(80)
            await asyncio.sleep(DAY_S / 4)
            assert rig.told() == [began, began.replace("began", "ended", 1)]

    rig.run(body)


def test_a_cluster_without_a_backup_for_days_is_told_and_one_with_a_backup_is_not(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target(topics=(Topic.BACKUP,)))
        async with rig.leading():
            for _ in range(BACKUP_DAYS):
                await asyncio.sleep(DAY_S)
                assert rig.messages == []
                await rig.store.update(note_backup, "", rig.clock.now_ns())
            await asyncio.sleep(1)
            await rig.store.update(note_backup, "no space left", rig.clock.now_ns())
            await asyncio.sleep(60)
            assert rig.told() == ["began the last backup of the cluster failed: no space left"]
            await rig.store.update(note_backup, "", rig.clock.now_ns())
            await asyncio.sleep(BACKUP_DAYS * DAY_S + 300)
            assert rig.told()[1:] == [
                "ended the last backup of the cluster failed: no space left",
                f"began the cluster has no complete backup from the last {BACKUP_DAYS} days: run skep backup",
            ]

    rig.run(body)


@pytest.mark.parametrize(("error", "later"), [("no space left", ""), ("", "no space left")])
def test_the_last_backup_counts_although_the_clock_of_its_manager_is_behind(
    rig: Rig, error: str, later: str
) -> None:
    async def body() -> None:
        await rig.found(a_target(topics=(Topic.BACKUP,)))
        now_ns = rig.clock.now_ns()
        await rig.store.update(note_backup, error, now_ns + 60 * SECOND_NS)
        await rig.store.update(note_backup, later, now_ns)
        async with rig.leading():
            await asyncio.sleep(60)
        assert rig.told() == ([f"began the last backup of the cluster failed: {later}"] if later else [])

    rig.run(body)


def test_a_new_target_is_told_what_is_wrong_now_and_a_removed_one_nothing(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target("first"))
        async with rig.leading():
            await rig.set_node("n1", NodeState.DOWN)
            await asyncio.sleep(60)
            await rig.store.update(add_target, a_target("second"))
            await asyncio.sleep(60)
            assert rig.told("second") == ["began node n1 is down"]
            await rig.store.update(remove_target, "first")
            await rig.set_node("n1", NodeState.READY)
            await asyncio.sleep(120)
            assert rig.told("first") == ["began node n1 is down"]
            assert rig.told("second")[1:] == ["ended node n1 is down"]
            await rig.set_node("n1", NodeState.DOWN)
            await asyncio.sleep(30)
            assert list(incidents_in(rig.store.view())) == ["node/n1"]
            await rig.store.update(remove_target, "second")
            await asyncio.sleep(1)
            assert [id for id in rig.store.view().ids(Payload) if id.startswith("notify/queue")] == []
            assert incidents_in(rig.store.view()) == {}

    rig.run(body)


def test_a_removed_node_ends_its_incident(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target())
        await rig.set_node("n1", NodeState.DOWN)
        async with rig.leading():
            await asyncio.sleep(60)
        await rig.store.update(lambda tx: tx.delete(Node, "n1"))  # while nobody leads
        async with rig.leading():
            await asyncio.sleep(60)
        assert rig.told() == ["began node n1 is down", "ended node n1 is down"]

    rig.run(body)


def test_services_are_degraded_as_status_shows_it(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target())
        async with rig.leading():
            web = a_service("web", replicas=1)
            await rig.store.update(lambda tx: tx.put(web))
            await asyncio.sleep(120)
            assert rig.told() == []  # it is converging, and nothing failed
            task = a_task("t1", service=web, state=TaskState.PENDING)
            status = replace(task.status, err="no suitable node (insufficient resources on 2 nodes)")
            await rig.store.update(lambda tx: tx.put(replace(task, status=status)))
            await asyncio.sleep(60)
            [line] = rig.told()
            assert line.startswith("began service web is degraded: no suitable node")
            running = replace(task.status, state=TaskState.RUNNING)
            await rig.store.update(lambda tx: tx.put(replace(task, node_id=NodeId("n2"), status=running)))
            await asyncio.sleep(120)
            assert rig.told()[1:] == [line.replace("began", "ended", 1)]

    rig.run(body)


def test_an_incident_lasts_while_its_object_cannot_be_read(rig: Rig) -> None:
    async def body() -> None:
        await rig.found(a_target())
        web = a_service("web", replicas=1)
        task = a_task("t1", service=web, state=TaskState.PENDING)
        status = replace(task.status, err="no suitable node (insufficient resources on 2 nodes)")
        await rig.store.update(lambda tx: [tx.put(web), tx.put(replace(task, status=status))])
        await rig.set_node("n1", NodeState.DOWN)
        async with rig.leading():
            await asyncio.sleep(60)
        began = rig.told()
        assert len(began) == 2
        damage(rig.store.cluster, "service", web.id, "")
        damage(rig.store.cluster, "node", "n1", "")
        rig.store = MemoryStore(
            rig.clock, rig.store.cluster
        )  # another manager, to which it was never readable
        async with rig.leading():
            await asyncio.sleep(600)
        assert rig.told() == began

    rig.run(body)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0.01, 60), st.floats(15, 20)), min_size=1, max_size=12),
    st.sampled_from([0.1, 4.0]),
    st.sampled_from(["", "it responded 503"]),
)
def test_changes_of_leader_at_any_time_neither_repeat_nor_lose_a_notice(
    terms: list[float], takes_s: float, failure: str
) -> None:
    rig = Rig()

    async def body() -> None:
        rig.takes_s = takes_s
        rig.failing["ops"] = failure
        await rig.found(a_target())
        await rig.set_node("n1", NodeState.DOWN)
        for number, lasts_s in enumerate(terms):
            async with rig.leading():
                await asyncio.sleep(lasts_s)
            if number == len(terms) // 2:
                rig.failing.clear()
        async with rig.leading():
            await asyncio.sleep(900)
        await rig.set_node("n1", NodeState.READY)
        for lasts_s in terms:
            async with rig.leading():
                await asyncio.sleep(lasts_s)
        async with rig.leading():
            await asyncio.sleep(900)

    try:
        rig.run(body)
        assert rig.told() == ["began node n1 is down", "ended node n1 is down"]
        for known in {message.id for _, message in rig.messages}:
            copies = [message for _, message in rig.messages if message.id == known]
            assert all(copy == copies[0] for copy in copies), "a second copy says the same"
    finally:
        rig.loop.close()
        asyncio.set_event_loop(None)
