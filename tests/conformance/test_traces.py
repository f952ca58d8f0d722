"""A simulated cluster with the production loops does with services what a real engine was seen to do.

The traces are recorded by ``record_traces``; the same actions are played on virtual time, and what both traces tell is
compared.  Every known difference has its reason beside it.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, assert_never
from unittest.mock import patch

import msgspec
import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from skep.api.formats.service_form import settled
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.manager.orchestrator import update
from skep.manager.orchestrator.replacement import restart, slot_views
from skep.model.node import Availability
from skep.model.options.labels import DRAIN_NOW
from skep.model.service import Service
from skep.model.values.ids import ServiceId
from skep.model.values.times import Timestamp, timestamp
from tests.conformance.traces import (
    CRASHES,
    CRASHES_AFTER_S,
    LONGEST_S,
    MISSING,
    QUIET_S,
    SCENARIOS,
    Act,
    Action,
    Create,
    Observed,
    Observer,
    Scenario,
    Seen,
    Update,
    reported,
)

RECORDED = Path(__file__).parent / "recorded" / "traces.json"
STEP_S = 0.01
WEB = ServiceId("web")


class Recording(msgspec.Struct, frozen=True):
    engine: str
    traces: dict[str, list[Seen]]


@cache
def recording() -> Recording:
    return msgspec.json.decode(RECORDED.read_bytes(), type=Recording)


def played(actions: tuple[Action, ...], seed: int) -> list[Seen]:
    """The trace of the same actions in a simulated cluster of one manager and one worker."""
    with SimulatedCluster(workers=1, seed=seed) as cluster:
        (node_id,) = cluster.nodes
        cluster.nodes[node_id].ending_images[CRASHES] = CRASHES_AFTER_S, 1
        cluster.nodes[node_id].broken_images.add(MISSING)
        cluster.run_for(5)
        observer, began = Observer(), cluster.loop.time()
        for action in actions:
            act(cluster, action)
            changed_at = acted_at = cluster.loop.time()
            while cluster.loop.time() < min(changed_at + QUIET_S, acted_at + LONGEST_S):
                before = len(observer.trace)
                look(cluster, observer, cluster.loop.time() - began)
                if len(observer.trace) > before:
                    changed_at = cluster.loop.time()
                cluster.run_for(STEP_S)
        return observer.trace


def act(cluster: SimulatedCluster, action: Action) -> None:
    (node_id,) = cluster.nodes
    now = stamp(cluster)
    match action:
        case Create(spec):
            cluster.write(
                lambda tx: create_service(tx, settled(spec), new_id=lambda: WEB, new_name=str, now=now)
            )
        case Update(spec):
            cluster.write(
                lambda tx: update_service(tx, WEB, settled(spec), tx.get(Service, WEB).version.index, now=now)
            )
        case Act("rollback"):
            cluster.write(
                lambda tx: rollback_service(
                    tx, WEB, tx.get(Service, WEB).spec, tx.get(Service, WEB).version.index, now=now
                )
            )
        case Act("crash"):
            (task,) = [one for one in cluster.wanted(WEB) if one.slot == 1]
            cluster.kill_container(task)
        case Act("drain"):
            cluster.label(node_id, **{DRAIN_NOW: "true"})  # as Docker drains
            cluster.set_availability(node_id, Availability.DRAIN)
        case Act("activate"):
            cluster.set_availability(node_id, Availability.ACTIVE)
        case Act():
            cluster.write(lambda tx: remove_service(tx, WEB, now=now))
        case _:
            assert_never(action)


def stamp(cluster: SimulatedCluster) -> Timestamp:
    return timestamp(cluster.clocks[cluster.managers[0]].now_ns())


def look(cluster: SimulatedCluster, observer: Observer, at_s: float) -> None:
    """As users see it: a removed service is not there, the tasks it leaves behind are."""
    service = cluster.service(WEB)
    status = service.update_status if service is not None and service.removed_at is None else None
    tasks = [
        (one.id, one.slot, one.created_at.rstrip("Z"), one.desired_state.value, one.status.state.value)
        for one in cluster.tasks(WEB)
    ]
    update = (status.state.value if status.state else "", status.message) if status is not None else ("", "")
    observer.look(at_s, tasks, update)


def with_cause(theirs: Observed, ours: Observed) -> Observed:
    """Our messages go on where the engine's end."""
    *states, message = theirs.updates
    goes_on = ours.updates[-1].startswith(f"{message}: ")
    return replace(theirs, updates=(*states, ours.updates[-1] if goes_on else message))


def how_often_it_crashes_is_chance(theirs: Observed, ours: Observed) -> Observed:
    """How many tasks of the failing version a slot has, before the rollback comes to it, is a matter of speed."""

    def is_back(reported: Observed, slot: str) -> bool:
        *past, last = reported.slots[slot]
        return last == "running" and "running" not in past and len(past) >= 2

    is_alike = all(is_back(theirs, slot) and is_back(ours, slot) for slot in ("1", "2"))
    return with_cause(replace(theirs, slots=ours.slots if is_alike else theirs.slots), ours)


def what_ran_runs_on(theirs: Observed, ours: Observed) -> Observed:
    """The engine stops a task for one that cannot be prepared."""
    assert theirs.slots["1"] == ("gone",)
    return with_cause(replace(theirs, slots={**theirs.slots, "1": ("running",)}), ours)


DIFFERENCES: dict[str, Callable[[Observed, Observed], Observed]] = {
    "failing update, rollback": how_often_it_crashes_is_chance,
    "missing image, pause": what_ran_runs_on,
}
"""Scenario -> the expected observation where it differs from the engine's trace, which may depend on ours."""


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("seed", range(2))
def test_what_happens_is_what_happened_to_an_engine(scenario: Scenario, seed: int) -> None:
    theirs, ours = reported(recording().traces[scenario.name]), reported(played(scenario.actions, seed))
    differing = DIFFERENCES.get(scenario.name)
    assert ours == (differing(theirs, ours) if differing is not None else theirs)


@pytest.mark.parametrize(
    ("module", "name", "twin", "scenario"),
    [
        (restart, "_waits_for_update", lambda *_: False, "update, stop-first"),
        (
            slot_views,
            "is_dirty",
            lambda task, situation: task.spec_version != situation.service.spec_version,
            "scale",
        ),
        (update._Rollout, "failure_step", lambda _: None, "failing update, pause"),
        (restart, "should_restart", lambda *_: True, "crash"),
    ],
    ids=["starts beside", "every version is new", "no failure counts", "ever again"],
)
def test_a_wrong_twin_differs_from_an_engine(module: Any, name: str, twin: Any, scenario: str) -> None:
    (meant,) = (one for one in SCENARIOS if one.name == scenario)
    with patch.object(module, name, twin):
        assert reported(played(meant.actions, 0)) != reported(recording().traces[scenario])


def test_every_scenario_was_recorded_and_every_difference_is_of_one() -> None:
    assert set(recording().traces) == {scenario.name for scenario in SCENARIOS}
    assert set(recording().traces) >= DIFFERENCES.keys()
    for name, differing in DIFFERENCES.items():
        theirs = reported(recording().traces[name])
        assert any(
            differing(theirs, reported(played(one.actions, 0))) != theirs
            for one in SCENARIOS
            if one.name == name
        )
