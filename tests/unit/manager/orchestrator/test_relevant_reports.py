"""What the scheduler writes of a task that waits has the orchestrator decide about its service again."""

from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from skep.model.options.dependencies import WAITS_FOR
from skep.model.options.labels import PROGRESS_DEADLINE
from skep.model.service import PortConfig, PublishMode, Service, ServiceSpec, UpdateConfig, UpdateState
from skep.model.task import Task, TaskState
from tests.support.builders import a_service, a_service_spec
from tests.support.managers.rollouts import AT_ONCE, image_of
from tests.unit.manager.orchestrator.test_refused_changes import Led

PORT = PortConfig(target_port=80, published_port=80, publish_mode=PublishMode.HOST)


@pytest.fixture
def led() -> Iterator[Led]:
    it = Led()
    yield it
    it.close()


def wanted(led: Led, image: str) -> list[Task]:
    return [task for task in led.store.view().find(Task) if task.is_wanted and image_of(task) == image]


def report(
    led: Led, is_meant: Callable[[Task], bool], state: TaskState, err: str = "", node: str = ""
) -> None:
    (task,) = [task for task in led.store.view().find(Task) if task.is_wanted and is_meant(task)]
    changed = replace(task, node_id=node, status=replace(task.status, state=state, err=err))
    led.write(lambda tx: tx.put(changed))


def update(led: Led, spec: ServiceSpec) -> None:
    led.write(lambda tx: tx.put(replace(tx.get(Service, "web"), spec=spec)))
    led.run_for(1)


def test_once_a_task_is_refused_a_node_its_update_retires_what_holds_the_port(led: Led) -> None:
    """A task that never came to run holds it; nothing else happens that the decision could be made for."""

    def a_spec_of(image: str) -> ServiceSpec:
        return a_service_spec(replicas=2, image=image, ports=(PORT,), restart=AT_ONCE)

    led.write(lambda tx: tx.put(a_service(spec=a_spec_of("hanging:1"))))
    led.run_for(1)
    report(led, lambda task: task.slot == 1, TaskState.PENDING)
    report(led, lambda task: task.slot == 2, TaskState.PREPARING, node="n1")
    update(led, a_spec_of("app:2"))
    assert [task.slot for task in wanted(led, "app:2")] == [1]
    report(led, lambda task: task.slot == 1, TaskState.PENDING)
    led.run_for(1)
    assert [task.slot for task in wanted(led, "hanging:1")] == [2]
    report(led, lambda task: task.slot == 1, TaskState.PENDING, "no suitable node (host-mode port in use)")
    led.run_for(1)
    assert wanted(led, "hanging:1") == []


def test_the_progress_deadline_of_a_task_begins_when_it_no_longer_waits_for_another_service(led: Led) -> None:
    def a_spec_of(image: str) -> ServiceSpec:
        spec = a_service_spec(image=image, update=UpdateConfig(parallelism=1), restart=AT_ONCE)
        return replace(spec, labels={PROGRESS_DEADLINE: "5s"})

    led.write(lambda tx: tx.put(a_service(spec=a_spec_of("app:1"))))
    led.run_for(1)
    led.report(TaskState.PENDING)
    update(led, a_spec_of("app:2"))
    report(led, lambda task: True, TaskState.PENDING, f"{WAITS_FOR}db to be healthy")
    led.run_for(60)
    assert led.service.update_status is not None
    assert led.service.update_status.state is UpdateState.UPDATING
    report(led, lambda task: True, TaskState.PREPARING, node="n1")
    led.run_for(30)
    assert led.service.update_status.state is UpdateState.PAUSED


def test_an_update_fails_soon_after_the_refusal_of_its_task_becomes_lasting(led: Led) -> None:
    """The first refusal names something that may come free, and the next one no longer does."""

    def a_spec_of(image: str) -> ServiceSpec:
        return a_service_spec(image=image, update=UpdateConfig(parallelism=1), restart=AT_ONCE)

    led.write(lambda tx: tx.put(a_service(spec=a_spec_of("app:1"))))
    led.run_for(1)
    report(led, lambda task: True, TaskState.RUNNING, node="n1")
    update(led, a_spec_of("app:2"))
    for refusal in ("disk full on 1 node", "missing plugin on 1 node"):
        report(
            led, lambda task: image_of(task) == "app:2", TaskState.PENDING, f"no suitable node ({refusal})"
        )
        led.run_for(5)
    assert led.service.update_status is not None
    assert led.service.update_status.state is UpdateState.UPDATING
    led.run_for(8)
    assert led.service.update_status.state is UpdateState.PAUSED
