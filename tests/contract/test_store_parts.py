"""The contract of the store: versions, parts with writers of their own, answers to a spec."""

import asyncio
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from skep.model.node import Node, SessionOwner
from skep.model.service import (
    Service,
    TaskSpec,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Task, TaskState, TaskStatus
from skep.store.interface import (
    Store,
    Transaction,
)
from skep.store.kinds import SpecVersion
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.store.store_rigs import Rig
from tests.support.store.store_transactions import (
    a_secret,
    change,
    delete,
    put,
)


async def test_the_version_grows_with_the_spec_and_only_with_it(store: Store) -> None:
    first = await store.update(put, a_node("n1"))
    reported = await store.update(change, Node, "n1", status=replace(first.status, message="fine"))
    assert reported.version == first.version
    assert reported.updated_at == first.updated_at
    relabeled = await store.update(change, Node, "n1", spec=replace(first.spec, labels={"a": "b"}))
    assert relabeled.version > first.version
    assert relabeled.created_at == first.created_at
    assert store.view().get(Node, "n1") == relabeled


async def test_a_version_is_never_below_a_revision_its_writer_had_seen(store: Store) -> None:
    for number in range(5):
        await store.update(put, a_secret(f"s{number}"))
    seen = store.view().revision
    assert (await store.update(put, a_secret("last"))).version.index >= seen


async def test_two_writers_of_different_parts_do_not_disturb_each_other(rig: Rig) -> None:
    await rig.store.update(put, a_node("n1"))
    await rig.other.barrier()
    node = rig.store.view().get(Node, "n1")

    def by_lookup(**fields: Any) -> Callable[[Transaction], Node]:
        def body(tx: Transaction) -> Node:
            found = tx.lookup(Node, "n1")
            assert found is not None
            return tx.put(replace(found, **fields))

        return body

    await asyncio.gather(
        rig.store.update(by_lookup(spec=replace(node.spec, labels={"x": "1"}))),
        rig.other.update(by_lookup(status=replace(node.status, message="up"))),
    )
    await rig.store.barrier()
    merged = rig.store.view().get(Node, "n1")
    assert (merged.spec.labels, merged.status.message) == ({"x": "1"}, "up")


async def test_a_part_is_not_written_for_an_object_that_is_gone(rig: Rig) -> None:
    await rig.store.update(put, a_task("t1"))
    await rig.other.barrier()
    for other, report in ((rig.store, rig.other), (rig.other, rig.store)):
        await other.update(put, a_task("t2"))
        await report.barrier()

        def running(tx: Transaction) -> None:
            task = tx.lookup(Task, "t2")
            if task is not None:
                tx.put(replace(task, status=TaskStatus(state=TaskState.COMPLETE, message="done")))

        await asyncio.gather(other.update(delete, Task, "t2"), report.update(running))
        await rig.store.barrier()
        assert rig.store.view().lookup(Task, "t2") is None


async def test_a_new_spec_drops_the_answers_to_the_old_one(rig: Rig) -> None:
    service = await rig.store.update(put, a_service("web"))
    assert service.spec_version == service.version
    answered = await rig.store.update(
        change, Service, "web", update_status=UpdateStatus(state=UpdateState.COMPLETED)
    )
    assert answered.spec_version == service.spec_version
    changed = await rig.store.update(change, Service, "web", spec=a_service_spec("web", replicas=7))
    assert changed.update_status is None
    assert changed.spec_version == changed.version
    await rig.other.barrier()
    assert rig.other.view().get(Service, "web") == rig.store.view().get(Service, "web") == changed


async def test_an_answer_that_comes_too_late_is_dropped(rig: Rig) -> None:
    """The leader answers the spec it has seen, while a user already writes another."""
    service = await rig.store.update(put, a_service("web"))
    await rig.other.barrier()

    def answer(tx: Transaction) -> None:
        seen = tx.lookup(Service, "web")
        assert seen is not None
        if seen.spec_version == service.spec_version:
            tx.put(replace(seen, update_status=UpdateStatus(state=UpdateState.UPDATING)))

    await asyncio.gather(
        rig.store.update(change, Service, "web", spec=a_service_spec("web", replicas=2)),
        rig.other.update(answer),
    )
    await rig.store.barrier()
    await rig.other.barrier()
    assert rig.store.view().get(Service, "web").update_status is None
    assert rig.other.view().get(Service, "web").update_status is None


async def test_a_tasks_spec_is_that_of_the_version_it_follows(rig: Rig) -> None:
    old = await rig.store.update(put, a_service("web", image="busybox:1"))
    await rig.store.update(put, a_task("t1", service=old))
    new = await rig.store.update(change, Service, "web", spec=a_service_spec("web", image="busybox:2"))
    await rig.store.update(put, replace(a_task("t2", service=new), spec=TaskSpec()))
    await rig.other.barrier()
    for store in (rig.store, rig.other):
        images = [
            task.spec.container_spec.image
            for task in store.view().find(Task, service_id="web")
            if task.spec.container_spec
        ]
        assert images == ["busybox:1", "busybox:2"]
        assert [version.index for version in store.view().find(SpecVersion, service_id="web")] == [
            old.version.index,
            new.version.index,
        ]


async def test_removing_a_service_removes_its_specs(store: Store) -> None:
    await store.update(put, a_service("web"))
    await store.update(change, Service, "web", spec=a_service_spec("web", replicas=2))
    await store.update(delete, Service, "web")
    assert store.view().find(SpecVersion) == []


async def test_a_session_is_taken_by_compare_and_swap(rig: Rig) -> None:
    await rig.store.update(put, a_node("n1"))
    await rig.other.barrier()

    def take(tx: Transaction, manager: str) -> bool:
        node = tx.rely_on(Node, "n1", "session")
        assert node is not None
        if node.session is not None:
            return False
        tx.put(replace(node, session=SessionOwner(manager_id=manager)))  # type: ignore[arg-type]
        return True

    taken = await asyncio.gather(rig.store.update(take, "m1"), rig.other.update(take, "m2"))
    assert sorted(taken) == [False, True]
