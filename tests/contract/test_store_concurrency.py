"""The contract of the store: many writers, a leader deposed, lost requests and answers."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.errors import (
    FailedPrecondition,
    NotFound,
    OutOfSequence,
    Unavailable,
)
from skep.model.node import Node
from skep.model.secret import Secret
from skep.model.service import (
    Service,
)
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId
from skep.model.values.meta import Version
from skep.store import leadership
from skep.store.interface import (
    NotLeader,
    Transaction,
)
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.store.store_rigs import FIRST, Rig
from tests.support.store.store_transactions import (
    a_secret,
    delete,
    eventually,
    outcome,
    put,
    using,
)


async def test_no_update_is_lost_among_many_writers(rig: Rig) -> None:
    await rig.store.update(put, a_node("n1"))
    await rig.other.barrier()

    def count(tx: Transaction) -> None:
        node = tx.get(Node, "n1")
        number = int(node.spec.labels.get("count", "0"))
        tx.put(replace(node, spec=replace(node.spec, labels={"count": str(number + 1)})))

    await asyncio.gather(*((rig.store if n % 2 else rig.other).update(count) for n in range(60)))
    await rig.store.barrier()
    assert rig.store.view().get(Node, "n1").spec.labels == {"count": "60"}


async def test_a_commit_fails_when_what_it_relied_on_has_changed(rig: Rig) -> None:
    """A task is only made for a service that is still there."""
    await rig.store.update(put, a_service("web"))
    await rig.other.barrier()

    def make(tx: Transaction, number: int) -> bool:
        if tx.rely_on(Service, "web") is None:
            return False
        tx.put(a_task(f"t{number}"))
        return True

    made = await asyncio.gather(
        rig.store.update(delete, Service, "web"), *(rig.other.update(make, n) for n in range(20))
    )
    await rig.store.barrier()
    revisions = [task.version.index for task in rig.store.view().find(Task)]
    assert len(revisions) == sum(bool(one) for one in made[1:])
    after = await rig.other.update(make, 99)
    assert after is False


async def test_update_each_commits_what_it_can(rig: Rig) -> None:
    await rig.store.update(put, a_service("web"))

    def make(tx: Transaction, number: int) -> Task:
        if number % 10 == 3:
            raise FailedPrecondition(f"not {number}")
        return tx.put(a_task(f"t{number:04}", slot=number))

    results = await rig.store.update_each(make, range(1000))
    assert [type(result).__name__ for result in results[:5]] == [
        "Task",
        "Task",
        "Task",
        "FailedPrecondition",
        "Task",
    ]
    assert len(results) == 1000
    assert len(rig.store.view().find(Task)) == 900
    again = await rig.store.update_each(
        lambda tx, task: tx.put(replace(tx.get(Task, task.id), desired_state=TaskState.SHUTDOWN)),
        rig.store.view().find(Task),
    )
    assert all(isinstance(result, Task) for result in again)
    assert all(task.desired_state is TaskState.SHUTDOWN for task in rig.store.view().find(Task))


async def test_update_each_runs_items_that_met_a_conflict_again(rig: Rig) -> None:
    await rig.store.update(put, a_node("n1"))

    def count(tx: Transaction, _: int) -> None:
        node = tx.get(Node, "n1")
        number = int(node.spec.labels.get("count", "0"))
        tx.put(replace(node, spec=replace(node.spec, labels={"count": str(number + 1)})))

    assert await rig.store.update_each(count, range(20)) == [None] * 20
    assert rig.store.view().get(Node, "n1").spec.labels == {"count": "20"}


async def test_a_leader_is_known_to_all(rig: Rig) -> None:
    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    await rig.other.barrier()
    assert rig.store.leader == rig.other.leader == FIRST
    assert await term.update(put, a_secret("s")) == term.view().get(Secret, "s")


async def test_a_deposed_leader_writes_nothing(rig: Rig) -> None:
    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    await term.update(put, a_secret("before"))
    await rig.depose()
    with pytest.raises(NotLeader):
        await term.update(put, a_secret("after"))
    assert [type(result) for result in await term.update_each(put, [a_secret("x"), a_secret("y")])] == [
        NotLeader,
        NotLeader,
    ]
    async with asyncio.timeout(5):
        await term.wait_lost()
    await rig.store.barrier()
    assert [secret.id for secret in rig.store.view().find(Secret)] == ["before"]
    await rig.store.update(put, a_secret("by the API"))


async def test_a_term_is_confirmed_as_long_as_it_lasts_and_nothing_is_written(rig: Rig) -> None:
    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    await rig.other.update(put, a_secret("s"))
    revision = rig.other.view().get(Secret, "s").version
    await term.confirm()
    assert term.view().get(Secret, "s").version == revision  # what was written before is seen
    await rig.depose()
    with pytest.raises(NotLeader):
        await term.confirm()


async def test_a_term_whose_writer_is_cancelled_goes_on_once_it_shows_what_came_of_the_write(
    rig: Rig,
) -> None:
    """As where a loop begins again from a snapshot: what it decides then is decided on all that was written."""
    terms = rig.store.terms(FIRST, "127.0.0.1:2377")
    term = await anext(terms)
    writing = asyncio.create_task(term.update(put, a_secret("s")))
    await asyncio.sleep(0)  # it is on its way
    writing.cancel()
    await asyncio.wait([writing])
    assert term.view().lookup(Secret, "s") is not None
    await term.update(put, a_secret("t"))
    await terms.aclose()  # type: ignore[attr-defined]


async def test_a_term_ends_when_a_cancelled_write_has_no_outcome_in_time(rig: Rig) -> None:
    """What came of the write shows when the next term of the same manager begins, and nothing comes of it later."""
    terms = rig.store.terms(FIRST, "127.0.0.1:2377")
    term = await anext(terms)
    rig.cut_store()
    writing = asyncio.create_task(term.update(put, a_secret("s")))
    await asyncio.sleep(0)  # it is on its way
    writing.cancel()
    async with asyncio.timeout(leadership.SETTLE_S + 5):
        await asyncio.wait([writing])
        rig.reconnect()
        await term.wait_lost()
    with pytest.raises(NotLeader):
        await term.update(put, a_secret("later"))
    async with asyncio.timeout(5):
        renewed = await anext(terms)
    assert renewed.number > term.number
    shown = renewed.view().lookup(Secret, "s")
    await renewed.update(put, a_secret("t"))
    await rig.store.barrier()
    assert rig.store.view().lookup(Secret, "s") == shown
    assert rig.store.view().lookup(Secret, "later") is None


async def test_a_write_whose_request_got_lost_is_sent_again(rig: Rig) -> None:
    rig.lose_request()
    await rig.store.update(put, using("web"))
    await rig.other.barrier()
    assert [service.id for service in rig.other.view().find(Service)] == ["web"]


async def test_a_write_whose_answer_got_lost_is_not_written_twice(rig: Rig) -> None:
    """The body would find its own name taken if it ran again on what it had written itself."""
    ids = iter(f"s{number}" for number in range(10))

    def create(tx: Transaction) -> Service:
        return tx.put(replace(using("web"), id=ServiceId(next(ids))))

    rig.lose_reply()
    async with asyncio.TaskGroup() as group:
        creating = group.create_task(rig.store.update(create))
        await eventually(lambda: rig.other.view().find(Service))
        rig.reconnect()
    assert creating.result().id == "s0"
    assert [service.id for service in rig.other.view().find(Service)] == ["s0"]


async def test_without_a_quorum_everything_fails_within_its_deadline(rig: Rig) -> None:
    rig.cut_store()
    async with asyncio.timeout(8):
        results = await asyncio.gather(
            outcome(rig.store.update(put, a_secret("s"))),  # type: ignore[arg-type]
            outcome(rig.store.barrier()),  # type: ignore[arg-type]
            outcome(rig.store.update(delete, Secret, "nothing")),  # type: ignore[arg-type]
        )
    assert [type(result) for result in results] == [Unavailable] * 3
    assert "does not have a leader" in str(results[0])
    rig.reconnect()
    await rig.store.barrier()
    await rig.store.update(put, a_secret("later"))
    assert rig.store.view().get(Swarm, "cluster")


async def test_an_error_is_only_believed_on_a_state_no_older_than_the_call(rig: Rig) -> None:
    """A replica that is behind must not say "not found" of what another manager has acknowledged."""
    for number in range(30):
        await rig.store.update(put, a_secret(f"s{number}"))
        await rig.other.update(delete, Secret, f"s{number}")
    with pytest.raises(NotFound):
        await rig.other.update(delete, Secret, "s0")


async def test_the_version_that_a_user_gives_is_compared_with_the_present_one(rig: Rig) -> None:
    def scale(tx: Transaction, version: Version, replicas: int) -> Service:
        service = tx.get(Service, "web")
        if service.version != version:
            raise OutOfSequence
        return tx.put(replace(service, spec=a_service_spec("web", replicas=replicas)))

    first = await rig.store.update(put, a_service("web"))
    await rig.other.barrier()
    results = await asyncio.gather(
        *(outcome((rig.store, rig.other)[n % 2].update(scale, first.version, n)) for n in range(2, 12))
    )
    assert sum(isinstance(result, Service) for result in results) == 1
    assert sum(isinstance(result, OutOfSequence) for result in results) == 9
