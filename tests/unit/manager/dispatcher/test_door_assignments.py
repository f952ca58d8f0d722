"""Certificates and challenges of the front door reach the nodes of its tasks, and no others."""

import asyncio
from math import inf
from random import Random

import msgspec
import pytest

from skep.aio.clock import SystemClock
from skep.manager.acme.door_files import DoorFiles
from skep.manager.acme.own_certificates import own_certificates
from skep.manager.acme.records import (
    NAMES_ID,
    CertificateOrder,
    HostCertificate,
    KnownNames,
    record_id,
)
from skep.manager.acme.showing import shown_certificates
from skep.manager.dispatcher.assignments import SentState, difference, everything
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.model.assignment import AssignmentSet
from skep.model.door.payloads import DoorPayload, merged
from skep.model.door.settings import DOOR
from skep.model.node import Node
from skep.model.secret import Secret, SecretSpec
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, SecretId, ServiceId, SessionId, new_id
from skep.security.authority import Authority
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, write_record
from skep.store.memory import MemoryStore
from tests.support.builders import a_docker_node, a_node, a_service, a_service_spec, a_task
from tests.support.security.external_ca import server_certificate
from tests.support.store.damage_rigs import damage

EDGE, INNER = NodeId("edge"), NodeId("inner")
replace = msgspec.structs.replace


class Rig:
    """A door with a task on ``edge``, and a service whose task is on ``inner``."""

    def __init__(self, edge: Node | None = None) -> None:
        self.store = MemoryStore(SystemClock())
        self.files = DoorFiles()
        self.edge = edge or a_node(EDGE)
        self.proxy = task_of("door", EDGE)

    async def fill(self) -> "Rig":
        spec = replace(a_service_spec("door"), labels={DOOR: "true"})
        objects = (
            self.edge,
            a_node(INNER),
            a_service("door", id="door", spec=spec),
            a_service("web", id="web"),
            self.proxy,
            task_of("web", INNER),
        )
        await self.store.update(lambda tx: [tx.put(one) for one in objects])
        await self.record(HostCertificate(name="a.example", pem="first", not_before_ns=1))
        return self

    async def record(self, record: HostCertificate) -> None:
        def write(tx: Transaction) -> None:
            write_record(tx, record_id(record.name), record)
            write_record(tx, NAMES_ID, KnownNames((record.name,)))

        async with self.store.watch(Payload) as watch:
            await self.store.update(write)
            commit = await anext(aiter(watch))
        assert any(self.files.on_event(event) for event in commit.events)

    def everything(self, node_id: NodeId) -> tuple[AssignmentSet, SentState]:
        return everything(self.store.view(), node_id, door_files=self.files.present)

    def difference(self, sent: SentState, *changed: Task) -> tuple[AssignmentSet | None, SentState]:
        ids = [one.id for one in changed]
        return difference(self.store.view(), EDGE, sent, ids, door_files=self.files.present)


def task_of(service: str, node_id: NodeId) -> Task:
    task = a_task(f"{service}1", node=node_id)
    return replace(task, service_id=ServiceId(service), status=TaskStatus(state=TaskState.RUNNING))


def payload_in(message: AssignmentSet | None) -> DoorPayload:
    assert message is not None
    return merged(msgspec.json.decode(one.data, type=DoorPayload) for one in message.secrets)


async def test_only_nodes_with_a_task_of_the_door_get_its_certificates() -> None:
    rig = await Rig().fill()
    assert payload_in(rig.everything(EDGE)[0]).certificates == {"a.example": "first"}
    assert rig.everything(INNER)[0].secrets == ()


async def test_engines_of_docker_get_none() -> None:
    rig = await Rig(edge=a_docker_node()).fill()
    assert rig.everything(EDGE)[0].secrets == ()


async def test_a_renewal_and_a_challenge_are_sent_alone_and_replace_the_former_ones() -> None:
    rig = await Rig().fill()
    first, sent = rig.everything(EDGE)
    order = CertificateOrder(key="k", began_ns=1, challenges={"token": "text"})
    await rig.record(HostCertificate(name="a.example", pem="first", not_before_ns=1, order=order))
    message, sent = rig.difference(sent)
    assert payload_in(message) == DoorPayload(challenges={"token": "text"})
    await rig.record(HostCertificate(name="a.example", pem="second", not_before_ns=2))
    message, sent = rig.difference(sent)
    assert payload_in(message).certificates == {"a.example": "second"}
    assert message is not None
    assert len(message.removed_secrets) == 2
    assert {one.id for one in first.secrets} < set(message.removed_secrets)
    assert rig.difference(sent)[0] is None


async def test_the_certificates_leave_with_the_last_task_of_the_door() -> None:
    rig = await Rig().fill()
    first, sent = rig.everything(EDGE)
    ended = replace(rig.proxy, status=TaskStatus(state=TaskState.SHUTDOWN))
    await rig.store.update(lambda tx: tx.put(ended))
    message, _ = rig.difference(sent, ended)
    assert message is not None
    assert set(message.removed_secrets) == {one.id for one in first.secrets}


async def test_a_changed_record_wakes_the_nodes_of_the_door_alone() -> None:
    rig = await Rig().fill()
    own = ManagerPeer(node_id=NodeId("m1"), addr="")
    dispatcher = Dispatcher(rig.store, own, SystemClock(), new_id, Random(1))
    running = asyncio.create_task(dispatcher.run())
    try:
        sessions = [LiveSession(id, SessionId(id), lambda: None, deadline=inf) for id in (EDGE, INNER)]
        for one in sessions:
            dispatcher.sessions.add(one)
        with sessions[0].assignment_signal() as edge, sessions[1].assignment_signal() as inner:
            async with asyncio.timeout(10):
                assert [await edge.wait(), await inner.wait()] == [None, None]  # woken by the snapshot
                await rig.record(HostCertificate(name="a.example", pem="second", not_before_ns=2))
                assert await edge.wait() == set()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await inner.wait()
    finally:
        running.cancel()
        await asyncio.wait([running])


def damaged(rig: Rig, id: str) -> View:
    """Return what a manager sees that starts when this payload is damaged."""
    damage(rig.store.cluster, "payload", id, "")
    return MemoryStore(SystemClock(), rig.store.cluster).view()


@pytest.mark.parametrize("id", [NAMES_ID, record_id("a.example")])
async def test_an_unreadable_record_takes_no_certificate_from_the_doors(id: str) -> None:
    rig = await Rig().fill()
    _, sent = rig.everything(EDGE)
    await rig.store.update(lambda tx: tx.put(Payload(id=id, data=b"?")))
    rig.files.reset()
    assert rig.difference(sent) == (None, sent)
    view = damaged(rig, id)
    rig.files.reset()
    assert difference(view, EDGE, sent, (), door_files=rig.files.present) == (None, sent)
    [shown] = shown_certificates(view, 0).certificates
    assert ("cannot read its record" in shown.error) == (id != NAMES_ID)


async def test_the_list_of_names_is_not_needed() -> None:
    rig = await Rig().fill()
    await rig.store.update(lambda tx: tx.put(Payload(id=NAMES_ID, data=b"?")))
    assert payload_in(everything(rig.store.view(), EDGE, door_files=DoorFiles().present)[0]).certificates == {
        "a.example": "first"
    }


async def test_an_unreadable_or_unusable_secret_leaves_its_host_a_certificate() -> None:
    chain, key = server_certificate(Authority.create(name="own"), "a.example")
    rig = await Rig().fill()
    secret = Secret(id=SecretId("s"), spec=SecretSpec(name="site"))
    spec = replace(a_service_spec("web"), labels={"skep.http": "a.example", "skep.http.tls": "site"})
    objects = (secret, Payload(id="secret/s", data=chain + key), a_service("web", id="web", spec=spec))
    await rig.store.update(lambda tx: [tx.put(one) for one in objects])
    rig.files.reset()
    message, sent = rig.everything(EDGE)
    assert payload_in(message).certificates == {"a.example": (chain + key).decode()}
    view = damaged(rig, "secret/s")
    rig.files.reset()
    assert own_certificates(view)["a.example"].is_unreadable
    assert difference(view, EDGE, sent, (), door_files=rig.files.present) == (None, sent)
    await rig.store.update(lambda tx: tx.put(Payload(id="secret/s", data=b"?")))
    rig.files.reset()
    assert payload_in(rig.difference(sent)[0]).certificates == {"a.example": "first"}  # of the authority
