"""Which task a word means for ``skep exec`` and the like."""

from contextlib import suppress

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import STEP, run_at_once
from skep.errors import FailedPrecondition, NotFound
from skep.manager.control import targets
from skep.manager.control.targets import TaskTarget, task_named
from skep.model.task import ContainerStatus, Task, TaskState
from skep.model.values.ids import ServiceId
from skep.model.values.meta import Version
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task


def target_of(*arguments):
    return run_at_once(targets.target_of(*arguments))


@pytest.fixture
async def store():
    store = MemoryStore(SystemClock())
    web, everywhere = a_service("web", id="s1web"), a_service("agent", id="s2agent")

    def fill(tx):
        for one in (web, everywhere, a_service("idle", id="s3idle"), a_node("n1"), a_node("n2")):
            tx.put(one)
        web_task, agent_task = {"service": ServiceId("s1web")}, {"service": ServiceId("s2agent"), "slot": 0}
        tx.put(
            a_task("old1", slot=1, node="n1", state=TaskState.FAILED, desired=TaskState.SHUTDOWN, **web_task)
        )
        tx.put(a_task("new1", slot=1, node="n1", state=TaskState.STARTING, **web_task))
        tx.put(a_task("two", slot=2, node="n2", **web_task))
        tx.put(a_task("three", slot=3, node="n1", **web_task))
        tx.put(a_task("here", node="n1", **agent_task))
        tx.put(a_task("there", node="n2", **agent_task))

    await store.update(fill)
    return store


@pytest.fixture
def view(store):
    return store.view()


@pytest.mark.parametrize(
    ("word", "task"),
    [
        ("web", "two"),  # the lowest slot that runs
        ("web.2", "two"),
        ("web.3", "three"),
        ("web.3.three", "three"),  # the name of its container
        ("s1web.3", "three"),
        ("three", "three"),
        ("old1", "old1"),  # by its id, whatever has become of it
        ("thr", "three"),
        ("agent.n2", "there"),
        ("agent", "here"),
    ],
)
def test_a_word_means_a_running_task(view, word, task):
    assert target_of(view, word).id == task


@pytest.mark.parametrize(
    ("word", "error", "text"),
    [
        ("web.1", FailedPrecondition, r"web\.1 has no running task \(it is starting\): see skep explain web"),
        ("web.9", FailedPrecondition, "service web has no task 9"),
        ("agent.n9", FailedPrecondition, "service agent has no task n9"),
        ("idle", FailedPrecondition, "idle has no running task"),
        ("other", NotFound, "no such service or task: other"),
        ("other.1", NotFound, r"no such service or task: other\.1"),
        ("", NotFound, "no such service or task: "),
        (".", NotFound, "no such service or task: "),
    ],
)
def test_what_means_no_running_task_is_explained(view, word, error, text):
    with pytest.raises(error, match=text):
        target_of(view, word)


async def test_the_id_of_a_container_means_its_task(store):
    def start(tx):
        for task, id in (("two", "3f2a" * 16), ("three", "3f2a" * 8 + "b" * 32)):
            status = replace(tx.get(Task, task).status, container_status=ContainerStatus(container_id=id))
            tx.put(replace(tx.get(Task, task), status=status))

    await store.update(start)
    view = store.view()
    assert target_of(view, "3f2a" * 16).id == "two"
    assert target_of(view, "3f2a" * 8 + "b").id == "three"
    for word in ("3f2a" * 8, "3f2a3f2a3f2", "3f2a" * 17):  # of two containers, too short, too long
        with pytest.raises(NotFound, match="no such service or task"):
            target_of(view, word)
    with pytest.raises(NotFound):
        target_of(view, "3f2a" * 16, lambda one: False)


@pytest.mark.parametrize("word", ["3f2a" * 16, "web", "web.7"])
async def test_other_requests_are_answered_while_many_tasks_are_looked_at(store, word):
    """A container's id may belong to any of 100,000 tasks."""
    await store.update_each(
        lambda tx, slot: tx.put(a_task(f"many{slot}", slot=slot, service=ServiceId("s1web"))),
        range(4, 10 * STEP),
    )
    pauses, work = 0, targets.target_of(store.view(), word)
    with suppress(NotFound):
        for _ in work:
            pauses += 1
    assert pauses >= 9


def test_a_target_is_shown_by_the_name_that_means_it(view):
    assert TaskTarget.of(view, target_of(view, "web")) == TaskTarget(
        task_id="two", service_id="s1web", node_id="n2", name="web.2", hostname="n2", state="running"
    )
    everywhere = TaskTarget.of(view, target_of(view, "agent.n2"))
    assert everywhere.name == "agent.n2"
    assert target_of(view, everywhere.name).id == "there"


async def test_the_first_task_of_a_job_has_the_name_of_its_slot(store):
    first = replace(a_task("first", slot=1, node="n1", service=ServiceId("s1web")), job_iteration=Version(1))
    await store.update(lambda tx: tx.put(first))
    assert TaskTarget.of(store.view(), first).name == "web.0"


@pytest.mark.parametrize("word", ["web", "web.2"])
async def test_of_two_tasks_in_a_slot_the_newest_that_is_wanted_is_meant(store, word):
    again = a_task("two-again", service=ServiceId("s1web"), slot=2, node="n2")
    await store.update(lambda tx: tx.put(again))
    assert target_of(store.view(), word).id == "two-again"
    stops = replace(store.view().get(Task, "two-again"), desired_state=TaskState.SHUTDOWN)
    await store.update(lambda tx: tx.put(stops))
    assert target_of(store.view(), word).id == "two", "though the other one runs still"


@pytest.mark.parametrize("word", ["wbe.t", "web.t", "web.tw", "web.9.t", "agent.t", "gone.1.t"])
@pytest.mark.parametrize("find", [target_of, task_named])
def test_a_mistyped_name_is_no_prefix_of_a_task_of_another_service(view, find, word):
    """Only one task has an id that begins with ``tw``, and ``skep exec`` would run in its container."""
    with pytest.raises((NotFound, FailedPrecondition)):
        find(view, word)


@pytest.mark.parametrize("find", [target_of, task_named])
def test_a_task_has_its_id_a_prefix_of_it_and_the_name_of_its_container(view, find):
    assert [find(view, word).id for word in ("two", "tw", "web.2", "web.2.two", "gone.2.two")] == ["two"] * 5
