"""Every view shows the same health of a service, in situations of simulated clusters."""

from collections.abc import Coroutine, Iterator, Mapping
from random import Random
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest

from sim.cluster import SimulatedCluster
from sim.faults.fault_injector import FaultInjector
from sim.users.users import Users
from sim.world.storage import SimulatedStorage
from skep.aio.clock import SystemClock
from skep.cli.see.status import service_rows
from skep.cli.stack.stack_lists import stacks
from skep.manager.control.tasks import known_status
from skep.manager.diagnosis.service_health import explanation_of, service_status, status_with_health
from skep.manager.routes.representations import problems_of, shown_service
from skep.manager.telemetry.metrics import service_families
from skep.manager.view.building import RowBuilder
from skep.manager.view.rows import ServiceRow
from skep.model.service import PAUSED, HealthState, Service
from skep.model.task import Task, TaskState
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import View
from skep.top.snapshot import Snapshot, health_of, states_of

pytestmark = pytest.mark.timeout(600)  # everything is computed, in 28 s beside other tests on a fast machine

CLUSTERS = 30
SURPLUS = (61, 81)
"""Further seeds, in which services have more tasks than desired."""
SITUATIONS = 10
"""Situations of each cluster, in which each service is compared."""


T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``, which only pauses, without an event loop beside that of the simulation."""
    try:
        while True:
            work.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def situations(seed: int) -> Iterator[tuple[View, int]]:
    """Yield states of a cluster with random services under random faults, each with its Unix time in nanoseconds."""
    random = Random(seed)
    with SimulatedCluster(managers=3, workers=4, seed=seed, storage=SimulatedStorage()) as cluster:
        users, injector = Users(cluster, Random(seed)), FaultInjector(cluster)
        users.begin()
        for _ in range(SITUATIONS):
            for _ in range(3):
                users.act()
            if random.random() < 0.5:
                injector.inject()
            cluster.run_for(random.choice((0.05, 0.4, 2.0, 8.0, 20.0)))
            yield cluster.view, cluster.clocks[cluster.managers[0]].now_ns()
            users.act()
            cluster.run_for(0.01)


async def shown(view: View, service: Service, now_ns: int) -> Mapping[str, str]:
    """Return the state of ``service`` by the view that shows it."""
    clock = SystemClock()
    status = await status_with_health(view, service, now_ns, clock)
    response = msgspec.json.decode(
        msgspec.json.encode(shown_service(problems_of(view, Service), service, status=status))
    )
    (line,) = service_rows([response], now_ns / 1e9)
    (top,) = states_of(Snapshot(services={service.id: response}), now_ns / 1e9)
    stacked = {**response, "Spec": {**response["Spec"], "Labels": {STACK_LABEL: "s"}}}
    explained = await explanation_of(view, service, await service_status(view, service), now_ns, clock)
    row, _ = await RowBuilder(clock).service(view, service.id, now_ns)
    assert isinstance(row, ServiceRow)
    states = next(one for one in service_families([(service, status)]) if one.name == "skep_service_state")
    return {
        "status": line.state.value,
        "top": health_of(top).value.lower(),
        "stack": stacks([stacked]).rows[0]["State"].value,
        "explain": explained.state.value,
        "dashboard": row.state,
        "metrics": " ".join(state.value for state in HealthState if f'"{state.value}"' in metric(states)),
    }


def metric(family: Any) -> str:
    """Return the labels of the samples that are 1."""
    return " ".join(one.labels for one in family.samples if one.value == 1)


class Compared(NamedTuple):
    """A service in one situation, and what the views show."""

    service: Service
    running: int
    desired: int
    has_unknown: bool
    """Whether a task is on a node whose state is not known."""
    states: Mapping[str, str]


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    found = []
    for seed in (*range(CLUSTERS), *SURPLUS):
        for view, now_ns in situations(seed):
            for service in view.find(Service):
                if service.removed_at is None:
                    status = run(service_status(view, service))
                    states = run(shown(view, service, now_ns))
                    tasks = view.find(Task, service_id=service.id)
                    has_unknown = any(known_status(view, one).state is TaskState.UNKNOWN for one in tasks)
                    found.append(
                        Compared(service, status.running_tasks, status.desired_tasks, has_unknown, states)
                    )
    return found


def test_all_views_show_the_same_state(compared: list[Compared]) -> None:
    assert CLUSTERS * SITUATIONS > 200
    assert len(compared) > CLUSTERS * SITUATIONS
    differ = [(one.service.spec.name, one.states) for one in compared if len(set(one.states.values())) > 1]
    assert differ == []


def test_the_situations_have_every_state_and_kind_of_service(compared: list[Compared]) -> None:
    assert {one.states["explain"] for one in compared} == {state.value for state in HealthState}
    modes = {"replicated", "global", "replicated-job", "global-job"}
    assert {one.service.spec.mode.name for one in compared} >= modes
    updates = {one.service.update_status.state for one in compared if one.service.update_status is not None}
    assert updates & set(PAUSED)
    assert any(one.running > one.desired for one in compared), "surplus tasks"
    assert any(one.has_unknown for one in compared), "tasks on nodes whose state is not known"
