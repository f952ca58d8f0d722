"""Changes that the store refuses: retried with backoff, shown on the service, and without effect on others."""

import asyncio
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import PortTaken, ResourceExhausted, Unavailable
from skep.manager.orchestrator import changes
from skep.manager.orchestrator import loop as orchestrator_loop
from skep.manager.orchestrator.changes import FillSlot
from skep.manager.orchestrator.loop import Orchestrator
from skep.model.container import ContainerSpec, SecretReference
from skep.model.secret import Secret, SecretSpec
from skep.model.service import Service, TaskSpec, UpdateConfig, UpdateFailureAction, UpdateState, UpdateStatus
from skep.model.task import Task, TaskState
from skep.model.values.ids import SecretId, ServiceId
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec


class Led:
    """A store that an orchestrator works on, on virtual time."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.clock = VirtualClock(self.loop)
        self.store = MemoryStore(self.clock)
        ids = iter(range(1, 1_000_000))
        orchestrator = Orchestrator(self.store, self.clock, lambda: f"t{next(ids):06}", Random(1))
        self.write(lambda tx: tx.put(a_node("n1")))
        self._running = self.loop.create_task(orchestrator.run())

    def write(self, body: Callable[[Transaction], object]) -> None:
        self.loop.run_until_complete(self.store.update(body))

    def run_for(self, seconds: float) -> None:
        self.loop.run_until_complete(self.clock.sleep(seconds))

    def report(self, state: TaskState) -> None:
        """Every task that is wanted and has not ended is in this state."""

        def body(tx: Transaction) -> None:
            for task in tx.find(Task):
                if task.is_wanted and not task.status.state.is_terminal:
                    tx.put(replace(task, node_id="n1", status=replace(task.status, state=state)))

        self.write(body)

    @property
    def service(self) -> Service:
        return self.store.view().get(Service, "web")

    def close(self) -> None:
        self._running.cancel()
        with pytest.raises(asyncio.CancelledError):
            self.loop.run_until_complete(self._running)
        self.loop.close()


@pytest.fixture
def led() -> Iterator[Led]:
    it = Led()
    yield it
    it.close()


def test_a_rollback_whose_secret_is_gone_becomes_a_pause_that_names_it(led: Led) -> None:
    secret = Secret(id=SecretId("s1"), spec=SecretSpec(name="password"))
    uses = SecretReference(secret_id=secret.id, secret_name="password")
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.ROLLBACK)
    new = a_service_spec(update=update, image="app:2")
    container = ContainerSpec(image="app:1", secrets=(uses,))
    old = replace(a_service_spec(), task_template=TaskSpec(container_spec=container))
    led.write(lambda tx: [tx.put(secret), tx.put(a_service(spec=old))])
    led.run_for(1)
    led.report(TaskState.RUNNING)
    led.write(lambda tx: tx.put(replace(tx.get(Service, "web"), spec=new, previous_spec=old)))
    led.write(lambda tx: tx.delete(Secret, "s1"))  # nothing refers to it any more
    led.run_for(1)
    led.report(TaskState.READY)
    led.run_for(1)
    led.report(TaskState.FAILED)
    led.run_for(1)
    status = led.service.update_status
    assert status is not None
    assert status.state is UpdateState.PAUSED
    assert "due to failure or early termination of task" in status.message
    assert status.message.endswith(": cannot roll back: secret s1 not found")


def test_a_refused_change_is_asked_again_later_and_later_and_no_other_waits_for_it(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    apply = changes.apply

    def refusing(tx: Transaction, change: Any, *rest: Any) -> None:
        if isinstance(change, FillSlot) and change.slot == 2:
            tried.append(led.loop.time())
            raise ResourceExhausted("transaction too large")
        apply(tx, change, *rest)

    monkeypatch.setattr("skep.manager.orchestrator.loop.apply", refusing)
    led.write(lambda tx: tx.put(a_service(replicas=3)))
    for _ in range(300):  # what happens to the other tasks has the service decided upon all the time
        led.run_for(1)
        led.report(TaskState.RUNNING)
        led.run_for(1)
        led.report(TaskState.FAILED)
    assert {task.slot for task in led.store.view().find(Task)} == {1, 3}
    assert len(tried) < 25
    assert tried[-1] - tried[-2] > 25
    message = "orchestration failed: transaction too large"
    assert led.service.update_status is not None
    assert led.service.update_status.message == message
    monkeypatch.undo()
    led.run_for(61)
    assert {task.slot for task in led.store.view().find(Task)} == {1, 2, 3}
    led.run_for(1)
    assert led.service.update_status is None


def test_an_error_leaves_what_a_paused_update_says(led: Led, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(tx: Transaction, change: Any, *rest: Any) -> None:
        raise ResourceExhausted("transaction too large")

    monkeypatch.setattr("skep.manager.orchestrator.loop.apply", refusing)
    cause = "update paused due to failure or early termination of task t9"
    status = UpdateStatus(state=UpdateState.PAUSED, message=cause)
    led.write(lambda tx: tx.put(replace(a_service(replicas=2), update_status=status)))
    led.run_for(120)
    assert led.service.update_status == replace(
        status,
        message=f"orchestration failed: transaction too large; the update: {cause}",
    )
    monkeypatch.undo()
    led.run_for(61)
    assert len(led.store.view().find(Task)) == 2
    assert led.service.update_status == status


def test_an_error_that_the_store_does_not_clear_is_cleared_later(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    clear_error = orchestrator_loop.clear_error

    def clear(tx: Transaction, id: ServiceId) -> None:
        tried.append(led.loop.time())
        if len(tried) == 1:
            raise Unavailable("no response in time")
        clear_error(tx, id)

    monkeypatch.setattr(orchestrator_loop, "clear_error", clear)
    status = UpdateStatus(message="orchestration failed: transaction too large")
    led.write(lambda tx: tx.put(replace(a_service(replicas=0), update_status=status)))
    led.run_for(5)
    assert led.service.update_status is None
    assert len(tried) == 2


@pytest.mark.parametrize(("stack", "is_named"), [("shop", True), ("blog", False)])
def test_a_pause_names_the_service_with_the_port_only_in_its_own_stack(stack: str, is_named: bool) -> None:
    service = a_service("shop_web")
    labels = {"com.docker.stack.namespace": "shop"}
    service = replace(service, spec=replace(service.spec, labels=labels))
    error = PortTaken(f"in use by '{stack}_db'", stack=stack, unnamed="in use by a service of another stack")
    found = changes.fallback_for(changes.RollBack(service, changes.ROLLED_BACK), error)
    assert isinstance(found, changes.SetUpdateStatus)
    assert (f"{stack}_db" in found.message) is is_named
    assert found.message.startswith("update paused: cannot roll back: in use by ")
