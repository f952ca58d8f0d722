"""The contract of the store: a watch follows its snapshot without a gap, whatever happens to the replica."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.model.secret import Secret
from skep.model.task import Task, TaskState, TaskStatus
from skep.store.interface import (
    Commit,
    Created,
    Deleted,
    Transaction,
    Updated,
    Watch,
)
from tests.support.builders import a_task
from tests.support.store.store_rigs import Rig
from tests.support.store.store_transactions import (
    a_secret,
    change,
    delete,
    eventually,
    put,
)


async def taken(watch: Watch, number: int) -> list[Commit]:
    commits: list[Commit] = []
    async for commit in watch:
        commits.append(commit)
        if len(commits) == number:
            break
    return commits


async def test_a_watch_goes_on_where_its_snapshot_ends(rig: Rig) -> None:
    """Writers never pause; snapshot and events together are everything, each once."""

    async def write() -> None:
        for number in range(300):
            await rig.store.update(put, a_task(f"t{number:03}"))

    async with asyncio.TaskGroup() as group:
        writing = group.create_task(write())
        for pause in (0, 1, 2):
            await eventually(lambda pause=pause: len(rig.other.view().find(Task)) > pause * 80)
            async with rig.other.watch(Task) as watch:
                known = [task.id for task in watch.snapshot.find(Task)]
                async for commit in watch:
                    for event in commit.events:
                        assert isinstance(event, Created)
                        known.append(event.object.id)  # type: ignore[attr-defined]
                    if len(known) >= pause * 80 + 60:
                        break
            assert known == [f"t{number:03}" for number in range(len(known))]
        await writing


async def test_a_commit_shows_all_changes_of_one_transaction_at_once(rig: Rig) -> None:
    await rig.store.update(put, a_task("t1"))
    await rig.other.barrier()
    async with rig.other.watch() as watch:

        def body(tx: Transaction) -> None:
            tx.put(replace(tx.get(Task, "t1"), node_id="n1", status=TaskStatus(state=TaskState.FAILED)))  # type: ignore[arg-type]
            tx.put(a_secret("s"))

        await rig.store.update(body)
        (commit,) = await taken(watch, 1)
    assert len(commit.events) == 2
    updates = [event for event in commit.events if isinstance(event, Updated)]
    assert [(event.old.node_id, event.new.node_id) for event in updates] == [("", "n1")]  # type: ignore[attr-defined]
    assert updates[0].new.status.state is TaskState.FAILED  # type: ignore[attr-defined]


async def test_a_watch_gets_events_of_its_kinds_only(rig: Rig) -> None:
    async with rig.store.watch(Secret) as watch:
        await rig.store.update(put, a_task("t1"))
        await rig.store.update(put, a_secret("s"))
        await rig.store.update(delete, Secret, "s")
        events = [event for commit in await taken(watch, 2) for event in commit.events]
    match events:
        case [Created(Secret(id="s")), Deleted(Secret(id="s"))]:
            pass
        case _:
            pytest.fail(f"{events}")


async def test_a_replica_that_was_away_resumes_without_a_gap(rig: Rig) -> None:
    await rig.store.update(put, a_task("t0"))
    await rig.other.barrier()
    async with rig.other.watch(Task) as watch:
        rig.cut_other()
        for number in range(1, 6):
            await rig.store.update(put, a_task(f"t{number}"))
        rig.reconnect()
        created = [event.object.id for commit in await taken(watch, 5) for event in commit.events]  # type: ignore[union-attr]
    assert created == ["t1", "t2", "t3", "t4", "t5"]


async def test_after_compaction_a_replica_loads_again_and_publishes_exactly_the_difference(rig: Rig) -> None:
    def fill(tx: Transaction) -> None:
        for number in range(4):
            tx.put(a_task(f"t{number}"))

    await rig.store.update(fill)
    await rig.other.barrier()
    async with rig.other.watch() as watch:
        rig.cut_other()
        await rig.store.update(delete, Task, "t0")
        await rig.store.update(change, Task, "t1", node_id="n1")
        await rig.store.update(change, Task, "t1", node_id="n2")
        await rig.store.update(put, a_secret("fleeting"))
        await rig.store.update(delete, Secret, "fleeting")
        await rig.store.update(put, a_task("t9"))
        await rig.compact()
        rig.reconnect()
        (commit,) = await taken(watch, 1)
        received = [(type(event).__name__, event) for event in commit.events]
        assert [name for name, _ in received] == ["Deleted", "Updated", "Created"]
        match [event for _, event in received]:
            case [
                Deleted(Task(id="t0")),
                Updated(Task(id="t1", node_id=""), Task(id="t1", node_id="n2")),
                Created(Task(id="t9")),
            ]:
                pass
            case events:
                pytest.fail(f"{events}")
        await rig.store.update(put, a_secret("later"))
        (after,) = await taken(watch, 1)
        assert [type(event).__name__ for event in after.events] == ["Created"]
    assert list(rig.other.view().find(Task)) == list(rig.store.view().find(Task))
