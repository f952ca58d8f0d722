"""The contract of the store, on the twin in memory and on a real etcd: objects, transactions, finding."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.errors import (
    InvalidArgument,
    NotFound,
    OutOfSequence,
    ResourceExhausted,
)
from skep.model.node import Node
from skep.model.secret import Config, ConfigSpec, Secret
from skep.model.service import (
    Service,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import ConfigId, ServiceId, TaskId
from skep.store.interface import (
    Store,
    Transaction,
)
from skep.store.kinds import Payload
from tests.support.builders import a_node, a_service, a_task
from tests.support.store.store_rigs import FIRST, Rig
from tests.support.store.store_transactions import (
    a_secret,
    change,
    delete,
    port,
    put,
    using,
)


async def test_an_object_comes_back_as_it_was_put(store: Store) -> None:
    requested = a_service("web", replicas=3, ports=(port(8080),))
    stored = await store.update(put, requested)
    assert stored.spec == requested.spec
    assert store.view().get(Service, requested.id) == stored


async def test_every_manager_sees_the_same_objects(rig: Rig) -> None:
    service = await rig.store.update(put, a_service("web"))
    task = await rig.store.update(put, a_task("t1", service=service))
    await rig.other.barrier()
    assert rig.other.view().get(Service, "web") == service
    assert rig.other.view().get(Task, "t1") == task


async def test_a_barrier_shows_what_was_acknowledged_elsewhere(rig: Rig) -> None:
    for number in range(50):
        await rig.store.update(put, a_secret(f"s{number}"))
        await rig.other.barrier()
        assert rig.other.view().lookup(Secret, f"s{number}") is not None


async def test_many_barriers_at_once_all_pass(rig: Rig) -> None:
    await rig.store.update(put, a_secret("s"))
    await asyncio.gather(*(rig.other.barrier() for _ in range(200)))
    assert rig.other.view().lookup(Secret, "s") is not None


async def test_finds_go_by_index_and_in_order_of_id(store: Store) -> None:
    def fill(tx: Transaction) -> None:
        for number in reversed(range(6)):
            tx.put(a_task(f"t{number}", slot=number, node=f"n{number % 2}", service="ab"[number // 3]))

    await store.update(fill)
    view = store.view()
    assert [task.id for task in view.find(Task)] == [f"t{number}" for number in range(6)]
    assert [task.id for task in view.find(Task, service_id="a")] == ["t0", "t1", "t2"]
    assert [task.id for task in view.find(Task, node_id="n1")] == ["t1", "t3", "t5"]
    assert [task.id for task in view.find(Task, slot="b/4")] == ["t4"]
    assert view.find(Task, node_id="nowhere") == []
    with pytest.raises(KeyError):
        view.find(Task, colour="green")


async def test_an_index_follows_the_object(store: Store) -> None:
    await store.update(put, a_task("t1", node=""))
    await store.update(change, Task, "t1", node_id="n1")
    assert [task.id for task in store.view().find(Task, node_id="n1")] == ["t1"]
    await store.update(change, Task, "t1", node_id="n2")
    assert store.view().find(Task, node_id="n1") == []
    await store.update(delete, Task, "t1")
    assert store.view().find(Task, node_id="n2") == []


async def test_a_transaction_sees_its_own_writes(store: Store) -> None:
    await store.update(put, a_task("t1", service="web"))

    def body(tx: Transaction) -> list[list[str]]:
        seen = []
        tx.put(a_task("t0", service="web"))
        seen.append([task.id for task in tx.find(Task, service_id="web")])
        tx.delete(Task, "t1")
        seen.append([task.id for task in tx.find(Task)])
        with pytest.raises(NotFound):
            tx.get(Task, "t1")
        return seen

    assert await store.update(body) == [["t0", "t1"], ["t0"]]
    assert [task.id for task in store.view().find(Task)] == ["t0"]


async def test_what_the_body_raises_is_raised_and_nothing_is_written(store: Store) -> None:
    def body(tx: Transaction) -> None:
        tx.put(a_secret("s"))
        raise OutOfSequence

    with pytest.raises(OutOfSequence):
        await store.update(body)
    assert store.view().lookup(Secret, "s") is None


async def test_a_body_that_writes_nothing_commits_nothing(store: Store) -> None:
    before = store.view().revision
    assert await store.update(lambda tx: len(tx.find(Service))) == 0
    assert store.view().revision == before


async def test_an_oversized_transaction_is_refused_whole(store: Store) -> None:
    def body(tx: Transaction) -> None:
        for number in range(600):
            tx.put(a_secret(f"s{number}"))

    with pytest.raises(ResourceExhausted, match="too large"):
        await store.update(body)
    assert store.view().find(Secret) == []


async def test_the_largest_transaction_fits_for_the_api_and_behind_the_fence(rig: Rig) -> None:
    """500 secrets are 1,000 keys, each written and compared; other writes go beside them."""

    def body(tx: Transaction, first: int) -> None:
        for number in range(first, first + 500):
            tx.put(a_secret(f"s{number}"))

    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    await asyncio.gather(
        rig.store.update(body, 0),
        term.update(body, 500),
        *(rig.store.update(put, a_task(f"t{number}")) for number in range(50)),
    )
    assert len(rig.store.view().find(Secret)) == 1000
    assert len(rig.store.view().find(Task)) == 50
    with pytest.raises(ResourceExhausted, match="too large"):
        await rig.store.update(lambda tx: [tx.put(a_secret(f"x{number}")) for number in range(501)])


async def test_large_objects_do_not_add_up_beyond_what_one_request_may_hold(store: Store) -> None:
    def body(tx: Transaction) -> None:
        for id in "ab":
            tx.put(Config(id=ConfigId(id), spec=ConfigSpec(name=id, data=b"x" * 900_000)))

    with pytest.raises(ResourceExhausted, match="too large"):
        await store.update(body)


async def test_the_largest_config_fits_and_a_larger_one_is_refused(store: Store) -> None:
    largest = Config(id=ConfigId("c"), spec=ConfigSpec(name="c", data=b"\xff" * 1000 * 1024))
    await store.update(put, largest)
    assert store.view().get(Config, "c").spec.data == largest.spec.data
    with pytest.raises(ResourceExhausted):
        await store.update(put, Config(id=ConfigId("d"), spec=ConfigSpec(name="d", data=b"x" * 2_000_000)))


async def test_payloads_are_kept_and_never_printed(store: Store) -> None:
    await store.update(put, Payload(id="secret/s", data=b"\x00hidden\xff"))
    assert store.view().get(Payload, "secret/s").data == b"\x00hidden\xff"
    assert "hidden" not in repr(store.view().get(Payload, "secret/s"))


async def test_ids_of_tasks_do_not_bring_them_together(store: Store) -> None:
    """Keys of one object are no prefix of another's."""
    for id in ("ab", "ab-c", "ab0", "a"):
        await store.update(put, a_task(id, state=TaskState.RUNNING))
    await store.update(delete, Task, TaskId("ab"))
    assert [task.id for task in store.view().find(Task)] == ["a", "ab-c", "ab0"]
    assert all(task.status.state is TaskState.RUNNING for task in store.view().find(Task))


async def test_a_word_means_an_id_then_a_name_then_a_prefix(store: Store) -> None:
    def fill(tx: Transaction) -> None:
        tx.put(replace(using("bcd"), id=ServiceId("abc")))
        tx.put(replace(using("abc"), id=ServiceId("xyz1")))
        tx.put(replace(using("xyz"), id=ServiceId("bcd1")))
        tx.put(replace(using("other"), id=ServiceId("xyz2")))

    await store.update(fill)
    resolve = store.view().resolve
    assert resolve(Service, "abc").id == "abc"
    assert resolve(Service, "BCD").id == "abc"
    assert resolve(Service, "xyz").id == "bcd1"
    assert resolve(Service, "bcd1").id == "bcd1"
    with pytest.raises(InvalidArgument, match=r"^service xy is ambiguous \(2 matches found\)$"):
        resolve(Service, "xy")
    with pytest.raises(NotFound, match=r"^service zzz not found$"):
        resolve(Service, "zzz")
    with pytest.raises(NotFound):
        resolve(Service, "")


async def test_a_node_is_meant_by_its_host_name_unless_several_have_it(store: Store) -> None:
    def fill(tx: Transaction) -> None:
        for id, hostname in (("n1", "web"), ("n2", "db"), ("n3", "DB")):
            node = a_node(id)
            tx.put(replace(node, description=replace(node.description, hostname=hostname)))

    await store.update(fill)
    assert store.view().resolve(Node, "WEB").id == "n1"
    with pytest.raises(InvalidArgument, match=r"node db is ambiguous \(2 matches found\)"):
        store.view().resolve(Node, "db")


async def test_a_task_is_meant_by_its_whole_name(store: Store) -> None:
    service = await store.update(put, a_service("web"))
    await store.update(put, a_task("t1", slot=3, service=service))
    assert store.view().resolve(Task, "web.3.t1").id == "t1"
    assert store.view().resolve(Task, "t").id == "t1"
    with pytest.raises(NotFound):
        store.view().resolve(Task, "web.2.t1")
