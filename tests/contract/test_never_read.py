"""What a manager does about values that it was never able to read: others may read them, so nothing is made of it."""

import asyncio
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import Unavailable
from skep.manager.ca.rotation import finish
from skep.manager.ca.updater import CertificateUpdater
from skep.manager.control.nodes import check_demotion, remove_node
from skep.manager.control.services import update_service
from skep.manager.control.swarm import _keep_unlock_key, resume_replacement
from skep.manager.dispatcher.assignments import everything
from skep.manager.dispatcher.node_sessions.adoption import orphans
from skep.manager.nodes.revocation import revoke
from skep.manager.orchestrator import global_services, replicated
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.reaper.kept_nodes import KeptNodes
from skep.manager.orchestrator.reaper.removals import Orphan, write
from skep.manager.orchestrator.reaper.state import NO_LIMIT, cluster_limit
from skep.manager.storage.recovery import doubt_volumes
from skep.manager.store_member import Autolock
from skep.manager.volumes.records import forget
from skep.model.network import Network
from skep.model.node import ManagerStatus, Node, NodeRole, NodeSpec, Reachability, SessionOwner
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.service import (
    JobStatus,
    RestartCondition,
    RestartPolicy,
    Service,
    UpdateState,
    UpdateStatus,
)
from skep.model.swarm import DEFAULT_SWARM_SPEC, Freeze, RootRotation, Swarm
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, ServiceId, SessionId, VolumeId
from skep.model.values.times import Timestamp
from skep.model.volume import PublishStatus, Volume, VolumeInfo, VolumeSpec
from skep.store.interface import View
from skep.store.keys import object_key
from skep.store.kinds import Payload, Revocation, has_unreadable_run
from skep.store.memory import MemoryCluster, MemoryStore
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.transactions.proposal import Proposal, Unchanged
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_cluster_volume, a_node, a_service, a_service_spec, a_task, an_overlay
from tests.support.managers.control_loops import leading, wait_for
from tests.support.store.damage_rigs import a_good_service_converges, cluster_with, damage

pytestmark = pytest.mark.timeout(30)

NOW = Timestamp("2026-01-02T00:00:00Z")
SWARM = Swarm(id=ClusterId("s1"), spec=DEFAULT_SWARM_SPEC)
ON_FAILURE = RestartPolicy(condition=RestartCondition.ON_FAILURE)


def loaded(*objects: object, damaged: tuple[tuple[str, str, str], ...]) -> MemoryStore:
    """A manager's store that starts when these ``(kind, id, part)`` are damaged already."""
    cluster = cluster_with(*objects)
    for kind, id, part in damaged:
        damage(cluster, kind, id, part)
    return MemoryStore(SystemClock(), cluster)


def is_frozen(view: View) -> bool:
    return any(swarm.freeze is not None for swarm in view.find(Swarm))


def a_manager(id: str) -> Node:
    return replace(
        a_node(id, role=NodeRole.MANAGER),
        manager_status=ManagerStatus(reachability=Reachability.REACHABLE, addr=f"{id}:2377"),
    )


def test_an_update_that_a_user_paused_stays_paused_and_is_not_written_over() -> None:
    paused = replace(a_service("web"), update_status=UpdateStatus(state=UpdateState.PAUSED, message="by me"))
    store = loaded(paused, damaged=(("service", "web", "update"),))
    assert store.view().get(Service, "web").update_status == UpdateStatus(
        state=UpdateState.PAUSED, message="the update's state cannot be read"
    )

    async def live() -> None:
        web = store.view().get(Service, "web")
        resumed = replace(web, update_status=UpdateStatus(state=UpdateState.UPDATING))
        with pytest.raises(Unavailable, match="update of service web cannot be read"):
            await store.update(lambda tx: tx.put(resumed))
        version = web.version.index
        another = a_service_spec("web", image="app:2")
        await store.update(update_service, ServiceId("web"), another, version, now=NOW)
        assert store.view().get(Service, "web").update_status is None  # a new update is one of its own
        assert not store.view().damaged(Service)

    asyncio.run(live())


def test_a_network_is_not_allocated_anew() -> None:
    store = loaded(
        an_overlay("net1"), a_node("n1"), a_node("n2"), SWARM, damaged=(("network", "net1", "allocation"),)
    )

    async def live() -> None:
        async with leading(store):
            await store.update(lambda tx: tx.put(an_overlay("net2", subnet="")))
            await a_good_service_converges(store)
            async with store.watch(Network) as watch:
                while store.view().get(Network, "net2").ipam_options is None:
                    await anext(watch)
        assert list(store.view().damaged(Network)) == ["net1"]
        mine = replace(store.view().get(Network, "net1"), ipam_options=an_overlay("net1").ipam_options)
        with pytest.raises(Unavailable, match="allocation of network net1 cannot be read"):
            await store.update(lambda tx: tx.put(mine))

    asyncio.run(live())


def test_what_ended_for_good_is_not_started_again_when_its_end_cannot_be_read() -> None:
    web, agent = a_service("web", restart=ON_FAILURE), a_service("agent", is_global=True, restart=ON_FAILURE)
    done = {"state": TaskState.COMPLETE, "desired": TaskState.SHUTDOWN, "node": "n1"}
    tasks = a_task("t1", service=web, **done), a_task("t2", slot=0, service=agent, **done)  # type: ignore[arg-type]
    store = loaded(
        web, agent, *tasks, a_node("n1"), damaged=(("task", "t1", "status"), ("task", "t2", "status"))
    )
    view = store.view()
    assert replicated.reconcile(web, [view.get(Task, "t1")]) == []
    assert global_services.reconcile(agent, [view.get(Task, "t2")], view.find(Node), ObservedTimes(0.0)) == []


def test_a_task_whose_end_cannot_be_read_is_not_called_orphaned() -> None:
    store = loaded(a_task("t1", node="gone", state=TaskState.COMPLETE), damaged=(("task", "t1", "status"),))
    task = store.view().get(Task, "t1")
    asyncio.run(store.update(write, Orphan(task), NOW))
    assert list(store.view().damaged(Task)) == ["t1"]


def test_a_freeze_that_cannot_be_read_is_one() -> None:
    assert not is_frozen(loaded(SWARM, damaged=()).view())
    frozen = replace(SWARM, freeze=Freeze(since=NOW, nodes=(NodeId("n1"),)))
    store = loaded(frozen, damaged=(("swarm", "s1", "freeze"),))
    assert is_frozen(store.view())
    asyncio.run(store.update(resume_replacement))
    assert not is_frozen(store.view())
    assert not store.view().damaged(Swarm)


def test_a_key_that_cannot_be_read_is_not_taken_for_absent() -> None:
    rotating = replace(SWARM, rotation=RootRotation(root="root", cross_signed=""))
    next_key, unlock_key = Payload(id="root-ca-next", data=b"key"), Payload(id="unlock-key", data=b"key")
    damaged = (("payload", "root-ca-next", ""), ("payload", "unlock-key", ""))
    store = loaded(rotating, next_key, unlock_key, damaged=damaged)

    async def live() -> None:
        with pytest.raises(Unavailable, match="payload root-ca-next cannot be read"):
            await store.update(finish, "root", lambda: "id")
        with pytest.raises(Unavailable, match="payload unlock-key cannot be read"):
            await store.update(lambda tx: _keep_unlock_key(tx, is_wanted=True, new_key=lambda: b"another"))

    asyncio.run(live())


@pytest.mark.parametrize("damaged", [("task", "t1", "networks"), ("service", "web", "")])
def test_a_task_is_not_sent_without_its_networks_or_its_service(damaged: tuple[str, str, str]) -> None:
    web = a_service("web")
    attached = (NetworkAttachment(network=an_overlay("net1"), addresses=("10.0.1.3/24",)),)
    task = replace(
        a_task("t1", node="n1", state=TaskState.ASSIGNED, service=web), networks_attachments=attached
    )
    objects = (an_overlay("net1"), web, task, a_node("n1"))
    message, _ = everything(loaded(*objects, damaged=()).view(), NodeId("n1"))
    assert [one.task.id for one in message.tasks] == ["t1"], "the case that is to be tested"
    assert message.complete
    message, _ = everything(loaded(*objects, damaged=(damaged,)).view(), NodeId("n1"))
    assert message.tasks == ()
    assert not message.complete, "the node may run it, and is not to remove it"


def test_a_volume_of_which_it_cannot_be_read_whether_it_was_made_is_not_forgotten() -> None:
    volume = Volume(
        id=VolumeId("v1"),
        spec=VolumeSpec(name="data"),
        info=VolumeInfo(volume_id="disk7"),
        pending_delete=True,
    )
    store = loaded(volume, damaged=(("volume", "v1", "info"),))
    asyncio.run(store.update(forget, VolumeId("v1")))
    assert store.view().lookup(Volume, "v1") is not None


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("info", {"info": VolumeInfo(volume_id="disk8")}),
        ("publish", {"publish_status": (PublishStatus(node_id=NodeId("n2")),)}),
    ],
)
def test_a_volume_whose_disk_or_place_cannot_be_read_gets_no_other(part: str, change: dict[str, Any]) -> None:
    volume = Volume(
        id=VolumeId("v1"),
        spec=VolumeSpec(name="data"),
        info=VolumeInfo(volume_id="disk7"),
        publish_status=(PublishStatus(node_id=NodeId("n1")),),
    )
    store = loaded(volume, damaged=(("volume", "v1", part),))
    shown = store.view().get(Volume, "v1")
    with pytest.raises(Unavailable, match=f"{part} of volume v1 cannot be read"):
        asyncio.run(store.update(lambda tx: tx.put(replace(shown, **change))))


def test_a_recovery_ends_though_a_volume_cannot_be_read() -> None:
    volumes = [
        Volume(id=VolumeId(id), spec=VolumeSpec(name=id), info=VolumeInfo(volume_id=id))
        for id in ("v1", "v2")
    ]
    store = loaded(*volumes, damaged=(("volume", "v1", "info"),))
    asyncio.run(doubt_volumes(store))
    assert list(store.view().damaged(Volume)) == ["v1"]


def test_a_service_goes_on_though_one_that_depends_on_it_cannot_be_read() -> None:
    labels = {"skep.depends-on": "db=service_started+restart"}
    db, web = a_service("db"), a_service("web", spec=replace(a_service_spec("web"), labels=labels))
    running = UpdateStatus(state=UpdateState.PAUSED)
    store = loaded(db, replace(web, update_status=running), damaged=(("service", "web", "update"),))

    async def live() -> None:
        version = store.view().get(Service, "db").version.index
        await store.update(
            update_service, ServiceId("db"), a_service_spec("db", image="app:2"), version, now=NOW
        )

    asyncio.run(live())
    assert list(store.view().damaged(Service)) == ["web"]


def test_a_task_on_a_network_that_cannot_be_read_holds_up_no_other() -> None:
    plain, attached = a_service("plain"), a_service("attached")
    waiting = {"state": TaskState.PENDING}
    on = (NetworkAttachment(network=an_overlay("net1"), addresses=("10.0.1.3/24",)),)
    task = replace(a_task("t1", service=attached, **waiting), networks_attachments=on)  # type: ignore[arg-type]
    other = a_task("t2", service=plain, **waiting)  # type: ignore[arg-type]
    objects = (an_overlay("net1"), plain, attached, a_node("n1"), task, other)
    store = loaded(*objects, damaged=(("network", "net1", "allocation"),))

    async def live() -> None:
        async with leading(store):
            await wait_for(store, lambda: store.view().get(Task, "t2").node_id == "n1")

    asyncio.run(live())


def test_sessions_of_a_manager_that_may_be_one_are_not_taken_over() -> None:
    of_m2 = replace(a_node("w1"), session=SessionOwner(manager_id=NodeId("m2"), session_id=SessionId("x")))
    store = loaded(a_manager("m2"), of_m2, damaged=(("node", "m2", "manager"),))
    nodes = store.view().find(Node)
    assert [one.node_id for one in orphans(nodes, (), NodeId("m1"))] == ["w1"]
    assert orphans(nodes, (), NodeId("m1"), [NodeId("m2")]) == []


def test_a_node_that_may_have_a_vote_is_not_removed() -> None:
    store = loaded(a_manager("m2"), damaged=(("node", "m2", "manager"),))
    with pytest.raises(Unavailable, match="whether node m2 is a manager with a vote"):
        asyncio.run(store.update(remove_node, NodeId("m2"), force=True, now_ns=1))


def test_a_record_of_revoked_certificates_is_not_written_over() -> None:
    store = loaded(a_node("n1"), Revocation(id="n1", until=NOW), damaged=(("revocation", "n1", ""),))
    with pytest.raises(Unavailable, match="revocation n1 cannot be read"):
        asyncio.run(store.update(revoke, a_node("n1"), 1, is_removed=True))


def test_history_stays_and_nodes_with_tasks_stay_when_their_settings_cannot_be_read() -> None:
    web = a_service("web")
    store = loaded(
        SWARM,
        web,
        a_task("t1", node="n1", service=web),
        damaged=(("swarm", "s1", ""), ("service", "web", "")),
    )
    assert cluster_limit(store.view()) == NO_LIMIT
    assert KeptNodes(store.view()).reason(a_node("n1"), 0.0)


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (("volume", "id-orders", "publish"), "where cluster volume id-orders is published is unreadable"),
        (("volume", "id-orders", ""), "where cluster volume id-orders is published is unreadable"),
        (("node", "n1", "status"), "its record in the store is unreadable"),
        (("service", "web", ""), "services cannot be read"),
    ],
)
def test_a_lost_node_stays_when_what_it_has_cannot_be_read(damaged: tuple[str, str, str], words: str) -> None:
    node = a_node("n1")
    engine = replace(node.description.engine, labels={SLOT_VOLUMES_LABEL: "data=db.1@1700000000000"})
    node = replace(node, description=replace(node.description, engine=engine))
    store = loaded(SWARM, a_service("web"), node, a_cluster_volume("orders"), damaged=(damaged,))
    assert words in KeptNodes(store.view()).reason(node, 1e9)
    intact = loaded(SWARM, a_service("web"), node, a_cluster_volume("orders"), damaged=())
    assert KeptNodes(intact.view()).reason(node, 1e9) == ""


def test_a_job_whose_run_has_a_spec_that_cannot_be_read_is_not_run_with_another() -> None:
    web = a_service("web")
    store = loaded(web, a_task("t1", service=web), damaged=())

    async def live() -> None:
        before = store.view().get(Service, "web")
        another = a_service_spec("web", image="app:2")
        await store.update(update_service, ServiceId("web"), another, before.version.index, now=NOW)
        pinned = replace(
            store.view().get(Service, "web"), job_status=JobStatus(spec_version=before.spec_version)
        )
        await store.update(lambda tx: tx.put(pinned))
        assert not has_unreadable_run(store.view(), "web")
        assert before.spec_version is not None
        damage(store.cluster, "spec", f"web/{before.spec_version.index}", "")
        later = MemoryStore(SystemClock(), store.cluster)
        assert has_unreadable_run(later.view(), "web")

    asyncio.run(live())


def test_of_two_managers_that_are_demoted_at_the_same_moment_one_stays() -> None:
    state = State()
    tx = LocalTransaction(state, 0)
    for id in ("m1", "m2", "m3"):
        tx.put(a_manager(id))
    state.apply(1, [KeyChange(key, value, 1, 1) for key, value in tx.proposal().puts])
    tx = LocalTransaction(state, 0)
    node = tx.get(Node, "m1")
    check_demotion(tx, node)
    tx.put(replace(node, spec=NodeSpec()))
    compared = tx.proposal().compares
    assert {Unchanged(object_key("node", other), 1) for other in ("m2", "m3")} <= {*compared}
    assert {Unchanged(object_key("node", other, "manager"), 1) for other in ("m2", "m3")} <= {*compared}


class Lock:
    """Of the keys on disk; remembers the keys that it was turned with."""

    def __init__(self) -> None:
        self.turned: list[bytes | None] = []
        self.is_turned = asyncio.Event()

    def turn(self, key: bytes | None) -> bool:
        self.turned.append(key)
        self.is_turned.set()
        return True


async def test_keys_on_disk_are_not_unlocked_while_the_unlock_key_cannot_be_read() -> None:
    cluster = MemoryCluster()
    await MemoryStore(SystemClock(), cluster).update(lambda tx: tx.put(Payload(id="unlock-key", data=b"key")))
    key = object_key("payload", "unlock-key")
    readable = cluster.log[key].value
    assert readable is not None
    damage(cluster, "payload", "unlock-key", "")
    lock = Lock()
    following = Autolock(MemoryStore(SystemClock(), cluster), lock, SystemClock(), Random(1))  # type: ignore[arg-type]
    running = asyncio.create_task(following.run())
    await asyncio.wait([asyncio.create_task(lock.is_turned.wait())], timeout=0.2)
    cluster.commit(Proposal(puts=((key, readable),)), None)
    await lock.is_turned.wait()
    running.cancel()
    assert lock.turned == [b"key"]


async def test_a_manager_goes_on_with_the_roots_that_it_has_while_those_in_the_store_cannot_be_read() -> None:
    class Served:
        def replace(self, pair: object) -> None:
            raise AssertionError("it would trust nobody")

    class Files:
        def changed(self) -> object:
            return object()

    cluster = MemoryCluster()
    await MemoryStore(SystemClock(), cluster).update(lambda tx: tx.put(SWARM))
    damage(cluster, "swarm", "s1", "ca")
    store = MemoryStore(SystemClock(), cluster)
    updater = CertificateUpdater(store, NodeId("m1"), Served(), Files(), SystemClock(), lambda: None)  # type: ignore[arg-type]
    await updater._update()


def test_a_task_is_given_no_node_while_the_labels_of_its_service_are_not_known() -> None:
    web = a_service("web")
    task = a_task("t1", service=web, state=TaskState.PENDING)
    store = loaded(web, task, a_node("n1"), damaged=(("service", "web", ""),))

    async def live() -> None:
        async with leading(store):
            await a_good_service_converges(store)
            assert store.view().get(Task, "t1").node_id == ""

    asyncio.run(live())
