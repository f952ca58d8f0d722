"""The quorum as a manager shows it without contacting others."""

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.quorum import quorum
from skep.model.node import ManagerStatus
from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_node


async def test_it_names_the_managers_that_do_not_answer_and_not_the_workers() -> None:
    store = MemoryStore(SystemClock())

    def fill(tx):
        for name in ("m1", "m2"):
            tx.put(replace(a_node(name), manager_status=ManagerStatus(addr=f"{name}:2377")))
        tx.put(a_node("w1"))

    await store.update(fill)
    reported = quorum(
        store.view(), NodeId("m1"), {NodeId("m2"): 3.25}, set(), Timestamp("2026-01-01T00:00:00Z")
    )
    assert not reported.has_leader
    assert [(one.id, one.is_reachable, one.unreachable_seconds) for one in reported.managers] == [
        ("m1", True, 0.0),
        ("m2", False, 3.2),
    ]
    assert not any(manager.has_quorum for manager in reported.managers)
    alone = quorum(store.view(), NodeId("m1"), {}, {NodeId("m2")}, Timestamp("2026-01-01T00:00:00Z"))
    assert [(one.id, one.has_quorum) for one in alone.managers] == [("m1", False), ("m2", True)]
    well = quorum(store.view(), NodeId("m1"), {}, {NodeId("m2")}, Timestamp(""))
    assert well.has_leader
    assert all(manager.has_quorum for manager in well.managers)
    assert all(manager.is_reachable for manager in well.managers)
