"""The simulation itself: virtual time, and that a seed gives the same run each time."""

import asyncio
from collections.abc import Iterable
from contextvars import Context, ContextVar
from functools import partial
from random import Random

import pytest

from sim import run, seeds
from sim.cluster import SimulatedCluster
from sim.world.committed import Change
from sim.world.time import Deadlock, Spinning, VirtualLoop
from skep.model.node import Availability
from skep.model.service import Service
from skep.store.interface import View
from tests.support.builders import a_service_spec


def test_an_hour_takes_no_time() -> None:
    loop = VirtualLoop()
    loop.run_until_complete(asyncio.sleep(3600))
    assert 3600 <= loop.time() < 3600.001
    loop.close()


def test_waiting_for_nothing_is_an_error() -> None:
    loop = VirtualLoop()
    waiting = loop.create_task(asyncio.Event().wait())
    with pytest.raises(Deadlock):
        loop.run_until_complete(waiting)
    waiting.cancel()
    loop.run_until_complete(asyncio.gather(waiting, return_exceptions=True))
    loop.close()


def test_a_task_keeps_what_it_sets_in_its_context() -> None:
    """The output of commands goes to the trace by such a variable, and a fresh loop has an empty context."""
    loop, name = VirtualLoop(), ContextVar("name", default="")
    answered = loop.create_future()
    loop.call_later(1, answered.set_result, None)

    async def named() -> str:
        name.set("upgrade")
        await answered
        return name.get()

    task = Context().run(loop.create_task, named())
    assert loop.run_until_complete(task) == "upgrade"
    loop.close()


def test_a_run_that_spins_is_ended_and_what_is_left_ends_in_peace() -> None:
    loop = VirtualLoop(turns_max=1000)

    def spin() -> None:
        loop.call_soon(spin)

    spin()
    with pytest.raises(Spinning):
        loop.run_until_complete(asyncio.sleep(1))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_a_long_run_may_have_more_iterations_than_a_short_one() -> None:
    loop = VirtualLoop(turns_max=1000)

    async def work(seconds: int) -> None:
        for _ in range(seconds):
            await asyncio.sleep(1)

    loop.run_until_complete(work(3000))
    loop.close()


def test_a_run_of_which_one_turn_does_not_end_has_failed() -> None:
    def stand_still(
        cluster: SimulatedCluster, steps: int, extensions: Random | None, commands: Random | None
    ) -> None:
        while True:
            pass

    (result,) = seeds.results([1], partial(run.simulate, live=stand_still), cpu_s_max=0.2)
    assert "Endless: after 0.2 s of processor time" in result.violations[0]


def test_an_error_in_a_rule_is_a_violation_and_does_not_reach_the_store() -> None:
    def rule(change: Change, view: View) -> Iterable[str]:
        yield from () if view.lookup(Service, "web") is None else [{}["web"]]

    with SimulatedCluster(seed=1) as cluster:
        cluster.observer.rules.append(rule)
        cluster.run_for(1)
        assert cluster.observer.violations == []
        cluster.create(a_service_spec("web", replicas=1))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)
        assert "a rule raised KeyError: 'web'" in cluster.observer.violations[0]


def a_run(seed: int) -> list[tuple[str, ...]]:
    """Everything that can be seen at the end of an eventful run."""
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=12))
        cluster.create(a_service_spec("agent", is_global=True))
        cluster.run_for(0.5)
        cluster.crash(cluster.leader)
        cluster.set_availability(cluster.workers[0], Availability.DRAIN)
        cluster.run_for(30)
        tasks = [*cluster.tasks("web"), *cluster.tasks("agent")]
        return [
            (task.id, task.node_id, task.status.state.value, task.status.timestamp, str(task.version.index))
            for task in tasks
        ]


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_gives_the_same_run(seed: int) -> None:
    assert a_run(seed) == a_run(seed)


def test_another_seed_gives_another_run() -> None:
    assert a_run(1) != a_run(2)
