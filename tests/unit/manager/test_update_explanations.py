"""What an update that is under way says of itself."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.cli.see.explain import about_service
from skep.manager.diagnosis.explanations import UpdateExplanation, explain_service
from skep.model.options.labels import STOPPED
from skep.model.service import Service, UpdateSplit, UpdateState, UpdateStatus
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.encoding import to_json
from skep.model.values.times import SECOND_NS, Timestamp, unix_ns
from tests.support.builders import a_node, a_service, a_task

STARTED = Timestamp("2026-01-31T12:00:00Z")


def updated(state: UpdateState | None = UpdateState.UPDATING) -> Service:
    web = a_service("web", replicas=3)
    spec = replace(web.spec, labels={"skep.progress-deadline": "30s"})
    return replace(web, spec=spec, update_status=UpdateStatus(state=state, message="update in progress"))


def reported(service: Service, *tasks: Task, new: tuple[str, ...] = ()) -> UpdateExplanation | None:
    nodes = {a_node("n1").id: a_node("n1")}
    return explain_service(
        service, tasks, wanted=3, nodes=nodes, is_new=lambda task: task.id in new, now_ns=0
    ).update


def slots(*states: TaskState) -> list[Task]:
    """One task each, ``t1`` to ``t3``."""
    return [
        replace(a_task(f"t{n}", slot=n, node="n1", state=state), created_at=STARTED)
        for n, state in enumerate(states, 1)
    ]


RUNNING, PENDING = TaskState.RUNNING, TaskState.PENDING
QUERY = {
    "skep.update.prometheus": "http://prometheus.example.org:9090",
    "skep.update.query": "sum(errors)",
    "skep.update.query-max": "0.01",
}


def test_a_paused_update_is_the_reason_while_surplus_tasks_stop() -> None:
    service = updated(UpdateState.PAUSED)
    message = "update paused due to failure or early termination of task t9: No such image"
    service = replace(service, update_status=UpdateStatus(state=UpdateState.PAUSED, message=message))
    surplus = replace(a_task("t4", slot=1, node="n1", state=RUNNING), created_at=STARTED)
    nodes = {a_node("n1").id: a_node("n1")}
    tasks = (*slots(RUNNING, RUNNING, RUNNING), surplus)
    found = explain_service(service, tasks, wanted=3, running=4, active=3, nodes=nodes, now_ns=0)
    assert (found.reason, found.summary) == (message, f"{message}; 3 of 3 tasks run, 1 more will stop")


def test_it_names_the_task_that_it_waits_for_and_until_when() -> None:
    done, lead, old = slots(RUNNING, PENDING, RUNNING)
    lead = replace(lead, status=TaskStatus(state=PENDING, err="no suitable node"), node_id="")
    predecessor = replace(old, id="t2-before", slot=2)
    found = reported(updated(), done, lead, predecessor, old, new=("t1", "t2"))
    assert found == UpdateExplanation(
        step="1 of 3 tasks are new",
        waiting_for="task web.2: no suitable node",
        deadline=Timestamp("2026-01-31T12:00:40Z"),  # and ten seconds for its predecessor to stop
    )


def test_while_its_predecessor_stops_there_is_no_deadline() -> None:
    done, lead, _ = slots(RUNNING, TaskState.READY, RUNNING)
    lead = replace(lead, desired_state=TaskState.READY)
    predecessor = a_task("t2-before", slot=2, node="n1", desired=TaskState.SHUTDOWN)
    found = reported(updated(), done, lead, predecessor, new=("t1", "t2"))
    assert found is not None
    assert found.deadline is None


def test_the_one_that_waits_for_longest_is_named() -> None:
    tasks = slots(PENDING, PENDING, PENDING)
    later = [replace(task, created_at=Timestamp("2026-01-31T12:00:05Z")) for task in tasks[:2]]
    found = reported(updated(), *later, tasks[2], new=("t1", "t2", "t3"))
    assert found is not None
    assert found.waiting_for.startswith("task web.3: ")


@pytest.mark.parametrize(
    ("new", "step", "waits_for"),
    [
        (("t1",), "1 of 3 tasks are new", "the delay before the next step"),
        (("t1", "t2", "t3"), "3 of 3 tasks are new", "the monitor time of the last step"),
    ],
)
def test_without_such_a_task_it_waits_for_time_to_pass(
    new: tuple[str, ...], step: str, waits_for: str
) -> None:
    found = reported(updated(), *slots(RUNNING, RUNNING, RUNNING), new=new)
    assert found == UpdateExplanation(step=step, waiting_for=waits_for)


@pytest.mark.parametrize(
    ("labels", "step", "waits_for"),
    [
        ({"skep.update": "canary", "skep.update.promote": "manual"}, 0, "skep update promote web"),
        (
            {"skep.update": "canary", "skep.update.step-time": "90s"},
            1,
            "the end of the step, which lasts 90s",
        ),
        (
            {"skep.update": "blue-green", "skep.update.keep": "5m"},
            1,
            "the end of the 5m for which old tasks are kept (skep update switch-back web returns to them)",
        ),
        ({"skep.update": "canary"}, 2, "the monitor time of the last step"),
        (
            {"skep.update": "canary", "skep.update.step-time": "90s", **QUERY},
            1,
            "the end of the step, which lasts 90s, and a figure within the bounds of its query sum(errors)",
        ),
        ({"skep.update": "canary", **QUERY}, 2, "the monitor time of the last step"),
    ],
)
def test_a_step_of_a_staged_update_names_what_ends_it(
    labels: dict[str, str], step: int, waits_for: str
) -> None:
    service = updated()
    status = replace(service.update_status or UpdateStatus(), split=UpdateSplit(step=step))
    service = replace(service, spec=replace(service.spec, labels=labels), update_status=status)
    found = reported(service, *slots(RUNNING, RUNNING, RUNNING), new=("t1",))
    assert found == UpdateExplanation(step="1 of 3 tasks are new", waiting_for=waits_for)


@pytest.mark.parametrize("state", [None, *UpdateState])
def test_only_an_update_that_is_under_way_has_steps(state: UpdateState | None) -> None:
    found = reported(updated(state), *slots(RUNNING, RUNNING, RUNNING))
    assert (found is not None) == (state in (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED))


@given(st.permutations(range(3)), st.sets(st.sampled_from(["t1", "t2", "t3"])))
def test_the_order_of_tasks_does_not_matter(order: list[int], new: set[str]) -> None:
    tasks = slots(PENDING, RUNNING, TaskState.PREPARING)
    shuffled = [tasks[place] for place in order]
    assert reported(updated(), *shuffled, new=tuple(new)) == reported(updated(), *tasks, new=tuple(new))


def test_people_read_it_in_one_line() -> None:
    found = explain_service(updated(), slots(RUNNING, PENDING, RUNNING), wanted=3, nodes={}, now_ns=0)
    now = unix_ns(Timestamp("2026-01-31T12:00:00Z")) / SECOND_NS
    lines = list(about_service("web", msgspec.json.decode(to_json(found)), now))
    assert (
        "  update: 2 of 3 tasks are new, waiting for task web.2: it waits for a node, for 40 s more" in lines
    )


def test_an_update_of_a_service_whose_tasks_have_ended_counts_none() -> None:
    ended = replace(slots(TaskState.COMPLETE)[0], desired_state=TaskState.SHUTDOWN)
    found = reported(updated(), ended, new=("t1",))
    assert found is not None
    assert (found.step, found.waiting_for) == ("its tasks have ended", "the monitor time of the last step")


def test_a_stopped_service_is_stopped_whatever_its_update_waits_for() -> None:
    service = updated()
    labels = {"skep.update": "canary", "skep.update.promote": "manual", STOPPED: "true"}
    status = replace(service.update_status or UpdateStatus(), split=UpdateSplit(step=0))
    service = replace(service, spec=replace(service.spec, labels=labels), update_status=status)
    found = explain_service(service, (), wanted=0, nodes={}, now_ns=0)
    assert found.summary == "stopped: skep service start web starts its tasks"
    assert found.update is None
