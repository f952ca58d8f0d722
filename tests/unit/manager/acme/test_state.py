"""What wakes the loop for certificates, and when it orders."""

from random import Random

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.acme.records import ACCOUNT_ID, AcmeAccount
from skep.manager.acme.showing import shown_certificates
from skep.manager.acme.state import NO_DOOR, STEP, WATCHED, CertificatesState
from skep.manager.acme.steps import BeginOrder
from skep.model.door.settings import DOOR
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import Transaction
from skep.store.kinds import write_record
from skep.store.memory import MemoryStore
from tests.support.builders import a_service, a_service_spec, a_task

APP = "app.example.com"
ACCOUNT = AcmeAccount(email="", directory="https://ca/dir", key="key", url="https://ca/account")


def door_task(state: TaskState) -> Task:
    task = replace(a_task("door1", node=NodeId("n1")), service_id=ServiceId("door"))
    return replace(task, status=TaskStatus(state=state))


def write_all(tx: Transaction) -> None:
    door = replace(a_service_spec("door"), labels={DOOR: "true"})
    web = replace(a_service_spec("web"), labels={"skep.http": APP})
    tx.put(a_service("door", id="door", spec=door))
    tx.put(a_service("web", id="web", spec=web))
    tx.put(door_task(TaskState.STARTING))
    write_record(tx, ACCOUNT_ID, ACCOUNT)


async def test_a_task_of_the_door_that_starts_begins_the_orders() -> None:
    store = MemoryStore(SystemClock())
    await store.update(write_all)
    [shown] = shown_certificates(store.view(), 1).certificates
    assert (shown.state.value, shown.error) == ("wanted", NO_DOOR)
    state = CertificatesState(store.view, SystemClock(), Random(1))
    assert state.due() is None
    async with store.watch(*WATCHED) as watch:
        await store.update(lambda tx: tx.put(door_task(TaskState.RUNNING)))
        state.on_commit(await anext(aiter(watch)))
    assert state.queue.take_due(1) == [STEP]
    assert state.due() == BeginOrder(APP)
    [shown] = shown_certificates(store.view(), 1).certificates
    assert (shown.state.value, shown.error) == ("wanted", "")
