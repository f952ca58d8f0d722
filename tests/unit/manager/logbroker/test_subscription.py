"""Readers of logs: their publishers, the bound of their queue, and what they miss."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.logbroker.selection import Selection, matches, selected, shortfall
from skep.manager.logbroker.subscription import LINES_MAX, LogSubscription
from skep.model.logs import LogLine, LogQuery
from skep.model.node import NodeDescription
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.meta import Version
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task

N1 = NodeId("n1")


async def test_a_query_means_tasks_by_service_by_id_and_by_node():
    web, db = a_service("web"), a_service("db")
    tasks = [
        a_task("t1", node="n1", service=web),
        a_task("t2", node="", slot=2, service=web, state=TaskState.PENDING),
        a_task("t3", node="n2", service=db),
        a_task("t4", node="n3", slot=2, service=db),
    ]
    store = MemoryStore(SystemClock())
    await store.update(lambda tx: [tx.put(object) for object in (web, db, *tasks)])
    view = store.view()
    assert selected(view, LogQuery(services=(ServiceId("web"),))) == Selection(
        nodes=frozenset({"n1"}), unscheduled=frozenset({"t2"})
    )
    assert selected(view, LogQuery(tasks=(TaskId("t3"), TaskId("gone")))).nodes == {"n2"}
    assert selected(view, LogQuery(nodes=(NodeId("n3"),), tasks=(TaskId("t1"),))).nodes == {"n1", "n3"}
    assert matches(LogQuery(services=(ServiceId("db"),)), view.find(type(tasks[0]), node_id="n2")[0])


async def test_what_is_missing_is_said_in_swarmkits_words_with_names():
    web, store = a_service("web"), MemoryStore(SystemClock())
    waits = a_task("t1", service=web, slot=2, state=TaskState.PENDING)
    waits = replace(waits, status=replace(waits.status, err="no suitable node (disk full on 1 node)"))
    await store.update(lambda tx: [tx.put(one) for one in (web, waits, a_node("n1"))])
    view = store.view()
    assert shortfall(view, Selection(), []) == ""
    waiting = Selection(unscheduled=frozenset({TaskId("t1"), TaskId("gone")}))
    assert shortfall(view, waiting, ["node n1 is not available"]) == (
        "warning: incomplete log stream. some logs could not be retrieved for the following reasons: "
        "node n1 is not available, task gone has not been scheduled, "
        "task web.2 has not been scheduled (no suitable node (disk full on 1 node))"
    )


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (replace(a_task("t1", slot=1), job_iteration=Version(index=2)), "web.0"),
        (replace(a_task("t1", slot=2), job_iteration=Version(index=2)), "web.1"),
        (a_task("t1", slot=0, node="n1"), "web.w1"),
    ],
)
async def test_a_task_that_is_not_scheduled_has_the_name_that_users_see(task: Task, name: str) -> None:
    store = MemoryStore(SystemClock())
    node = replace(a_node("n1"), description=NodeDescription(hostname="w1"))
    await store.update(lambda tx: [tx.put(one) for one in (a_service("web"), task, node)])
    text = shortfall(store.view(), Selection(unscheduled=frozenset({task.id})), [])
    assert f"task {name} has not been scheduled" in text


async def test_a_node_waits_while_the_reader_is_behind():
    subscription = LogSubscription("s", LogQuery())
    line = LogLine(task_id=TaskId("t1"), node_id=N1)
    for _ in range(LINES_MAX):
        assert await subscription.put([line], N1)
    waiting = asyncio.ensure_future(subscription.put([line], N1))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert subscription.take_many(1) == [line]
    assert await waiting


async def test_a_node_does_not_wait_for_a_reader_that_has_gone():
    subscription = LogSubscription("s", LogQuery())
    line = LogLine(task_id=TaskId("t1"), node_id=N1)
    for _ in range(LINES_MAX):
        await subscription.put([line], N1)
    waiting = asyncio.ensure_future(subscription.put([line], N1))
    await asyncio.sleep(0)
    subscription.close()
    assert not await waiting
    assert subscription.take_many(1) == []


async def test_a_subscription_is_complete_when_every_node_has_finished_and_never_while_following():
    subscription = LogSubscription("s", LogQuery())
    subscription.pending = {N1}
    assert not subscription.is_complete
    subscription.finish(N1)
    await subscription.wait_update()
    assert subscription.is_complete
    assert not LogSubscription("s", LogQuery(follow=True)).is_complete
