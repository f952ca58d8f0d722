"""Waiting for services goes on while no manager answers."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualLoop
from skep.api.client.client import ApiClient
from skep.errors import NotFound, Unavailable
from skep.model.service import Service
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ServiceId, TaskId
from skep.stack.progress import STEADY_S, UNPLACED_S, ServiceProblem, ServiceProgress, progress_of
from skep.stack.waiting import HeldTimes, Look, Reasons, Steadiness, unfinished, wait_done, wait_for
from tests.support.harness.clocks import on_virtual_time


class Managers:
    """They answer ``looks`` one after the other."""

    def __init__(self, *looks: ServiceProgress | Exception) -> None:
        self._looks = list(looks)

    async def look(self, names: set[str]) -> dict[str, ServiceProgress]:
        found = self._looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return dict.fromkeys(names, found)


@on_virtual_time
async def test_a_change_of_leader_is_waited_for() -> None:
    gone, shown = Unavailable("no leader"), []
    managers = Managers(
        ServiceProgress("1 of 2"), gone, gone, OSError("reset"), ServiceProgress("2 of 2", is_done=True)
    )
    await wait_done(["web"], managers.look, lambda name, text: shown.append((name, text)))
    assert shown == [
        ("web", "1 of 2"),
        ("managers", "no response, trying again: no leader"),
        ("managers", "no response, trying again: reset"),
        ("web", "2 of 2"),
    ]


async def test_an_address_where_nothing_answers_is_an_error_at_once() -> None:
    with pytest.raises(Unavailable):
        await wait_done(["web"], Managers(Unavailable("nothing there")).look, lambda *_: None)


async def test_what_does_not_go_on_is_an_error_that_names_the_next_step_and_is_not_shown_before() -> None:
    shown: list[str] = []
    managers = Managers(ServiceProgress("update paused due to t", is_stuck=True))
    with pytest.raises(Unavailable, match=r"^web: update paused due to t\. Run skep explain web\.$"):
        await wait_done(["web"], managers.look, lambda _, text: shown.append(text))
    assert shown == []


async def test_an_error_has_the_causes_of_all_services_that_are_not_done() -> None:
    stuck = ServiceProgress("0 of 1 tasks run", "no node can accept a task: needs 16 CPUs", is_stuck=True)
    looks = {
        "db": ServiceProgress("0 of 1 tasks run", "exit 1"),
        "web": stuck,
        "ok": ServiceProgress("1 of 1 tasks run", is_done=True),
        "new": ServiceProgress("0 of 1 tasks run"),
    }

    async def look(_names: set[str]) -> dict[str, ServiceProgress]:
        return looks

    words = r"needs 16 CPUs\. Also not done: db: 0 of 1 tasks run: exit 1\. Run skep explain web\.$"
    with pytest.raises(Unavailable, match=words):
        await wait_done(list(looks), look, lambda *_: None)
    looks |= {f"s{number}": ServiceProgress("0 of 1 tasks run", "exit 2") for number in range(7)}
    with pytest.raises(
        Unavailable, match=r"s3: 0 of 1 tasks run: exit 2; and 3 more\. Run skep explain web\.$"
    ):
        await wait_done(list(looks), look, lambda *_: None)


def test_a_job_that_completes_after_a_failure_is_done_at_once() -> None:
    steadiness = Steadiness()
    failing = ServiceProgress("2 of 3 tasks completed", "exit 1", problem=ServiceProblem(failures=1))
    assert not steadiness.is_steady("job", failing, 1.0)
    done = ServiceProgress("3 of 3 tasks completed", is_done=True, is_final=True)
    assert steadiness.is_steady("job", done, 1.5)


class Explaining(ApiClient):
    """Explains services.  ``explanations``: by id; one that is missing is not found."""

    def __init__(self, explanations: dict[str, Any]) -> None:
        super().__init__("http://nowhere")
        self.explanations = explanations
        self.asked: list[str] = []

    async def request(self, method: str, path: str, **options: Any) -> Any:
        self.asked.append(path)
        id = path.split("/")[3]
        if id not in self.explanations:
            raise NotFound("page not found")
        return self.explanations[id]


@pytest.mark.parametrize("every_s", [20, 70])
def test_a_service_whose_tasks_get_nodes_one_after_the_other_is_waited_for(every_s: int) -> None:
    """As where an autoscaler adds nodes: a task waits all the time, and never the same number."""
    client = Explaining({"w": {"Reason": "no suitable node", "Problem": {"Kind": "no-node"}}})

    async def wait() -> ServiceProgress:
        reasons, loop = Reasons(client, 5), asyncio.get_running_loop()
        while True:
            count = f"{int(loop.time() / every_s)} of 10 tasks run"
            looks = {"web": Look(id="w", progress=ServiceProgress(count, "no suitable node"))}
            found = (await reasons.explain(looks))["web"]
            if found.is_stuck or loop.time() > 190:
                return found
            await asyncio.sleep(0.5)

    loop = VirtualLoop()
    found = loop.run_until_complete(wait())
    loop.close()
    assert found.is_stuck is (every_s > UNPLACED_S)


async def test_only_what_is_not_done_is_explained_and_a_manager_without_reasons_is_no_error() -> None:
    looks = {
        "web": Look(id="w", progress=ServiceProgress("1 of 1 tasks run", is_done=True)),
        "db": Look(id="d", progress=ServiceProgress("0 of 1 tasks run", "?"), current=frozenset({"t"})),
        "new": Look(id="n", progress=ServiceProgress("0 of 2 tasks run")),
        "old": Look(id="o", progress=ServiceProgress("0 of 1 tasks run", "words of a task")),
        "off": Look(
            id="f", progress=ServiceProgress("tasks left to stop: 1", "w1 is down", is_explained=True)
        ),
    }
    problem = {"Kind": "rejected", "Failures": 2, "TaskID": "t"}
    client = Explaining({"d": {"Reason": "No such image: nope:1", "Problem": problem}})
    found = await Reasons(client, 5).explain(looks)
    assert sorted(client.asked) == ["/skep/services/d/explain", "/skep/services/o/explain"]
    assert {name: one.text for name, one in found.items()} == {
        "web": "1 of 1 tasks run",
        "db": "0 of 1 tasks run: 2 failures in a row: No such image: nope:1",
        "new": "0 of 2 tasks run",
        "old": "0 of 1 tasks run: words of a task",
        "off": "tasks left to stop: 1: w1 is down",
    }
    assert [name for name, one in found.items() if one.is_stuck] == ["db"]
    found = await Reasons(client, 0).explain(looks)
    assert not found["db"].is_stuck


async def test_the_reason_stays_while_the_managers_already_see_the_next_attempt_run() -> None:
    client = Explaining({"w": {"Reason": 'exit 9, last line "boom"'}})
    reasons, failed = Reasons(client, 5), ServiceProgress("0 of 1 tasks run", "task: non-zero exit (9)")
    looks = {"web": Look(id="w", progress=failed)}
    assert (await reasons.explain(looks))["web"].cause == 'exit 9, last line "boom"'
    client.explanations["w"] = {"Reason": ""}
    assert (await reasons.explain(looks))["web"].cause == 'exit 9, last line "boom"'
    other = {"web": Look(id="w", progress=ServiceProgress("0 of 1 tasks run"))}
    assert (await reasons.explain(other))["web"].cause == ""


def test_the_error_of_a_wait_names_the_first_service_to_explain() -> None:
    texts = {"shop_db": "0 of 1 tasks run: exit 1", "shop_web": "0 of 2 tasks run"}
    assert unfinished(texts, 600.0) == (
        "not done within 600 s: shop_db: 0 of 1 tasks run: exit 1; shop_web: 0 of 2 tasks run. "
        "Run skep explain shop_db."
    )
    text = "not done within 9 s: all tasks run, but not long enough to verify that they keep running"
    assert unfinished({}, 9.0) == text


def test_a_service_that_has_failed_has_to_run_for_a_while() -> None:
    runs = ServiceProgress("1 of 1 tasks run", is_done=True)
    starts = ServiceProgress("0 of 1 tasks run")
    failed = ServiceProgress("0 of 1 tasks run", "exit 1", problem=ServiceProblem(kind="exit", failures=1))
    steadiness = Steadiness()
    assert not steadiness.is_steady("web", starts, 0.0)
    assert steadiness.is_steady("web", runs, 0.5)
    assert not steadiness.is_steady("db", failed, 0.0)
    assert not steadiness.is_steady("db", runs, 1.0)
    assert not steadiness.is_steady("db", failed, 4.0), "in the middle of a crash loop"
    assert not steadiness.is_steady("db", runs, 7.0)
    assert not steadiness.is_steady("db", runs, 7.0 + STEADY_S - 0.1)
    assert steadiness.is_steady("db", runs, 7.0 + STEADY_S)


class Leaderless(ApiClient):
    """Managers that lose their leader after the first look."""

    def __init__(self) -> None:
        super().__init__("http://nowhere")
        self._requests = 0

    async def request(self, method: str, path: str, **options: Any) -> Any:
        self._requests += 1
        if self._requests > 3:
            raise Unavailable("The swarm does not have a leader.")
        if path.startswith("/services/"):
            return {"ID": "w", "Spec": {"Name": "web", "Mode": {"Replicated": {"Replicas": 1}}}}
        return []


def test_a_wait_whose_managers_lose_their_leader_says_so_at_its_end() -> None:
    loop = VirtualLoop()
    try:
        words = (
            r"^not done within 20 s: no response, .*: The swarm does not have a leader\. Run skep status\.$"
        )
        with pytest.raises(Unavailable, match=words):
            loop.run_until_complete(wait_for(Leaderless(), ("web",), lambda *_: None, 20.0))
    finally:
        loop.close()


class Crashing(ApiClient):
    """The only task of the service runs at the first look and has failed at all later ones."""

    def __init__(self) -> None:
        super().__init__("http://nowhere")
        self._looks = 0

    async def request(self, method: str, path: str, **_: Any) -> Any:
        if path == "/services/web":
            self._looks += 1
            return {"ID": "w", "Version": {"Index": 9}, "Spec": {"Name": "web", "TaskTemplate": {}}}
        if path != "/tasks":
            raise NotFound("an earlier version")
        state, wanted = ("running", "running") if self._looks == 1 else ("failed", "shutdown")
        status = {"State": state, "Err": "" if self._looks == 1 else "exit 4"}
        return [{"ID": "t", "ServiceID": "w", "Slot": 1, "Status": status, "DesiredState": wanted}]


def test_the_error_of_a_wait_names_a_service_that_has_failed_after_it_ran() -> None:
    async def main() -> list[bool]:
        with pytest.raises(Unavailable, match=r"^not done within 20 s: web: 0 of 1 tasks run: exit 4\."):
            await wait_for(Crashing(), ("web",), lambda *_: None, 20.0)
        return []

    in_virtual_time(main())


def test_a_service_that_has_just_started_has_to_run_for_its_monitor_time() -> None:
    first = ServiceProgress("1 of 1 tasks run", is_done=True, steady_s=3.0, started_at="t1")
    steadiness = Steadiness()
    assert not steadiness.is_steady("web", first, 0.0)
    assert not steadiness.is_steady("web", first, 2.9)
    assert steadiness.is_steady("web", first, 3.0)
    again = replace(first, started_at="t2")
    assert not steadiness.is_steady("web", again, 3.5), "restarted between two looks"
    assert not steadiness.is_steady("web", again, 6.0)
    assert steadiness.is_steady("web", again, 6.5)


def test_a_task_that_fails_a_moment_after_a_look_ends_no_wait_with_success() -> None:
    runs = ServiceProgress("1 of 1 tasks run", is_done=True, steady_s=STEADY_S)
    stuck = ServiceProgress("0 of 1 tasks run", "5 failures in a row: exit 4", is_stuck=True)
    shown: list[str] = []

    async def main() -> list[bool]:
        managers = Managers(runs, runs, ServiceProgress("0 of 1 tasks run", "exit 4"), stuck)
        with pytest.raises(Unavailable, match="5 failures in a row: exit 4"):
            await wait_done(["web"], managers.look, lambda _, text: shown.append(text))
        return []

    in_virtual_time(main())
    assert shown[1:] == ["1 of 1 tasks run, verifying that they keep running", "0 of 1 tasks run: exit 4"]


async def test_failures_are_counted_though_few_ended_tasks_are_kept() -> None:
    """Of each look only the last two ended tasks are left."""
    reasons, progress = Reasons(Explaining({}), 5), ServiceProgress("0 of 2 tasks run", "exit 1")

    async def is_stuck(*failed: tuple[str, int]) -> bool:
        look = Look(id="s", progress=progress, current=frozenset(id for id, _ in failed), failed=dict(failed))
        return (await reasons.explain({"web": look}))["web"].is_stuck

    assert not await is_stuck(("a", 1), ("b", 1))
    assert not await is_stuck(("b", 1), ("c", 1))
    assert not await is_stuck(("c", 1), ("d", 1), ("e", 2)), "another slot"
    assert await is_stuck(("d", 1), ("f", 1))


def in_virtual_time(main: Coroutine[Any, Any, list[bool]]) -> list[bool]:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


def test_failures_before_a_task_ran_for_a_while_are_not_in_a_row_with_those_after() -> None:
    waits = ServiceProgress("1 of 2 tasks run", "exit 1")

    async def ends(ran_s: float) -> list[bool]:
        reasons, found = Reasons(Explaining({}), 3), list[bool]()
        looks = (("a b", ""), ("a b", "r"), ("a b", "r"), ("a b r", ""), ("b r s", ""), ("b r s t", ""))
        for number, (failed, running) in enumerate(looks):
            look = Look(
                id="s",
                progress=waits,
                current=frozenset("abrst"),
                failed=dict.fromkeys(failed.split(), 1),
                running=dict.fromkeys(running, 1),
            )
            found.append((await reasons.explain({"web": look}))["web"].is_stuck)
            await asyncio.sleep(ran_s if number == 1 else 0.5)
        return found

    assert in_virtual_time(ends(STEADY_S)) == [False, False, False, False, False, True]
    assert in_virtual_time(ends(STEADY_S - 1)) == [False, False, False, True, True, True]


FAILED, RUNNING, SHUTDOWN = TaskState.FAILED, TaskState.RUNNING, TaskState.SHUTDOWN
STARTING = TaskState.STARTING


@pytest.mark.parametrize(
    ("rows", "present", "failures", "cause"),
    [
        pytest.param([(FAILED, SHUTDOWN, STARTING)], [(0, 1, 2)], 0, "", id="stopped by an update"),
        pytest.param([(FAILED, RUNNING, STARTING)], [(0, 2)], 0, "", id="replaced by another spec"),
        pytest.param([(FAILED, RUNNING), (STARTING,)], [(0, 1), (0,)], 0, "exit 4", id="runs again"),
        pytest.param([(FAILED, FAILED, STARTING)], [(0, 1, 2)], 2, "exit 4", id="fails at present"),
    ],
)
async def test_failures_of_the_present_spec_before_the_wait_are_not_counted(
    rows: list[tuple[TaskState, ...]], present: list[tuple[int, ...]], failures: int, cause: str
) -> None:
    """For example, tasks had failed before an update that is now rolled back.  ``rows``: states of a slot's tasks."""
    tasks = {
        (slot, number): Task(
            id=TaskId(f"{slot}-{number}"),
            slot=slot + 1,
            created_at=f"2026-11-30T17:26:0{number}Z",
            status=TaskStatus(state=state, err="exit 4" if state is FAILED else ""),
            desired_state=RUNNING if number == len(states) - 1 else SHUTDOWN,
        )
        for slot, states in enumerate(rows)
        for number, state in enumerate(states)
    }
    current = frozenset(tasks[slot, number].id for slot, row in enumerate(present) for number in row)
    service = Service(id=ServiceId("s"))
    progress = progress_of(service, list(tasks.values()), current)
    look = Look.of("s", progress, list(tasks.values()), current)
    explained = (await Reasons(Explaining({}), 5).explain({"web": look}))["web"]
    assert (explained.problem.failures, explained.cause) == (failures, cause)


def test_a_service_that_is_given_up_at_two_looks_is_not_waited_for() -> None:
    problem = {"Kind": "exit", "Failures": 1, "TaskID": "t", "IsGivenUp": True}
    reasons = Reasons(Explaining({"s": {"Reason": "exit 1", "Problem": problem}}), 5)
    progress = ServiceProgress("0 of 1 tasks run", "exit 1")

    async def ends() -> list[bool]:
        found = list[bool]()
        for _ in range(2):
            look = Look(id="s", progress=progress, current=frozenset("t"))
            found.append((await reasons.explain({"web": look}))["web"].is_stuck)
            await asyncio.sleep(1)
        return found

    assert in_virtual_time(ends()) == [False, True]


def test_a_task_that_no_node_accepts_is_waited_for_a_minute() -> None:
    refused = ServiceProgress("0 of 1 tasks run", "no suitable node", problem=ServiceProblem(kind="no-node"))
    waits = ServiceProgress("0 of 1 tasks run")

    async def ends() -> list[bool]:
        reasons, found = Reasons(Explaining({}), 5), list[bool]()
        for progress, then_s in ((refused, 59), (waits, 2), (refused, 59), (refused, 2), (refused, 0)):
            explained = await reasons.explain({"web": Look(id="s", progress=progress)})
            found.append(explained["web"].is_stuck)
            await asyncio.sleep(then_s)
        return found

    assert in_virtual_time(ends()) == [False, False, False, False, True]


def test_a_fact_holds_since_the_first_look_after_it_did_not() -> None:
    times = HeldTimes()
    assert times.held_s("web", 1.0, holds=False) == 0
    assert times.held_s("web", 2.0, holds=True) == 0
    assert times.held_s("web", 7.0, holds=True) == 5
    assert times.held_s("db", 7.0, holds=True) == 0
    assert times.held_s("web", 8.0, holds=False) == 0
    assert times.held_s("web", 9.0, holds=True) == 0
