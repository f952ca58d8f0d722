"""The rule that updates take turns rejects what it should, and nothing else."""

from sim.invariants.services.serving import UpdateParallelism
from skep.model.service import UpdateConfig
from skep.model.task import TaskState
from tests.sim.histories import W1, History, a_node, a_service, a_task
from tests.support.builders import a_service_spec

RUNNING, SHUTDOWN = TaskState.RUNNING, TaskState.SHUTDOWN


def a_history(parallelism: int) -> History:
    """Three slots of app:1 run, and app:2 is asked for."""
    history = History(UpdateParallelism())
    config = UpdateConfig(parallelism=parallelism)
    spec = a_service_spec("web", replicas=3, update=config, image="app:2")
    history.put(a_node(W1), a_service())
    history.put(*(a_task(f"old{slot}", slot=slot, node="w1", state=RUNNING) for slot in (1, 2, 3)))
    service = history.state.find(type(a_service()))[0]
    history.commit(lambda tx: tx.put(type(service)(id=service.id, spec=spec)))
    return history


def take(history: History, slot: int, *, image: str = "app:2") -> None:
    history.put(a_task(f"new{slot}", slot=slot, node="w1", image=image, desired=TaskState.READY))
    history.put(a_task(f"old{slot}", slot=slot, node="w1", state=RUNNING, desired=SHUTDOWN))


def test_a_slot_taken_while_another_one_is_out_is_rejected() -> None:
    history = a_history(1)
    take(history, 1)
    assert history.violations == []
    take(history, 2)
    assert history.violations == ["slots [1, 2] of web are out of service, 1 may be"]


def test_one_after_the_other_is_how_it_should_be() -> None:
    history = a_history(1)
    for slot in (1, 2, 3):
        take(history, slot)
        history.put(a_task(f"new{slot}", slot=slot, node="w1", image="app:2", state=RUNNING))
    assert history.violations == []


def test_a_new_task_that_fails_is_no_update_under_way() -> None:
    history = a_history(1)
    take(history, 1)
    history.put(a_task("new1", slot=1, node="w1", image="app:2", state=TaskState.FAILED))
    take(history, 2)
    assert history.violations == []


def test_a_new_task_that_gets_nowhere_is_none_after_the_progress_deadline() -> None:
    for seconds, is_told in ((500.0, True), (700.0, False)):
        history = a_history(1)
        take(history, 1)
        take(history.after(seconds), 2)
        assert bool(history.violations) is is_told


def test_a_restart_is_no_update_and_no_limit_is_none() -> None:
    history = a_history(1)
    for slot in (1, 2, 3):
        take(history, slot, image="app:1")
    assert history.violations == []
    history = a_history(0)
    for slot in (1, 2, 3):
        take(history, slot)
    assert history.violations == []
