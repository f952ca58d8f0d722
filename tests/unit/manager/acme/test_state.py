"""What wakes the loop for certificates, and when it orders."""

import asyncio
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.acme.loop import Certificates
from skep.manager.acme.records import (
    ACCOUNT_ID,
    NAMES_ID,
    AcmeAccount,
    CertificateOrder,
    HostCertificate,
    KnownNames,
    account_in,
    record_id,
    record_in,
)
from skep.manager.acme.showing import shown_certificates
from skep.manager.acme.state import STEP, WATCHED, CertificatesState
from skep.manager.acme.steps import (
    ASK_S,
    AcmeFailed,
    BeginOrder,
    DropOrder,
    Outcome,
    Wanted,
    WindowKnown,
)
from skep.manager.acme.writing import begin_order, configure, note_outcome
from skep.model.door.settings import DOOR
from skep.model.node import NodeState
from skep.model.service import Service
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import Transaction
from skep.store.kinds import write_record
from skep.store.level import LEVEL
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.store.damage_rigs import damage
from tests.support.store.store_transactions import raise_level

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
    tx.put(a_node("n1"))
    tx.put(door_task(TaskState.STARTING))
    write_record(tx, ACCOUNT_ID, ACCOUNT)


async def test_a_task_of_the_door_that_starts_begins_the_orders() -> None:
    store = MemoryStore(SystemClock())
    await store.update(write_all)
    [shown] = shown_certificates(store.view(), 1).certificates
    assert (shown.state.value, shown.error) == (
        "wanted",
        "no proxy of the front door runs. Run skep explain door",
    )
    state = CertificatesState(store.view, SystemClock(), Random(1))
    assert state.due() is None
    async with store.watch(*WATCHED) as watch:
        await store.update(lambda tx: tx.put(door_task(TaskState.RUNNING)))
        state.on_commit(await anext(aiter(watch)))
    assert state.queue.take_due(1) == [STEP]
    assert state.due() == BeginOrder(APP)
    [shown] = shown_certificates(store.view(), 1).certificates
    assert (shown.state.value, shown.error) == ("wanted", "")


async def test_a_task_of_the_door_on_a_lost_node_serves_no_challenge_until_the_node_returns() -> None:
    store = MemoryStore(SystemClock())
    await store.update(write_all)
    await store.update(lambda tx: tx.put(door_task(TaskState.RUNNING)))
    await store.update(lambda tx: tx.put(a_node("n1", state=NodeState.DOWN)))
    state = CertificatesState(store.view, SystemClock(), Random(1))
    assert state.due() is None, "the orders would fail, and delay those after the return by hours"
    async with store.watch(*WATCHED) as watch:
        await store.update(lambda tx: tx.put(a_node("n1")))
        state.on_commit(await anext(aiter(watch)))
    assert state.queue.take_due(1) == [STEP]
    assert state.due() == BeginOrder(APP)


async def test_a_name_keeps_its_order_while_its_service_cannot_be_read() -> None:
    store = MemoryStore(SystemClock())
    await store.update(write_all)
    await store.update(lambda tx: tx.put(door_task(TaskState.RUNNING)))
    await store.update(begin_order, APP, "key", 1)
    damage(store.cluster, "service", "web", "")
    view = MemoryStore(SystemClock(), store.cluster).view()
    assert CertificatesState(lambda: view, SystemClock(), Random(1)).due() is None
    await store.update(lambda tx: tx.delete(Service, "web"))
    assert CertificatesState(store.view, SystemClock(), Random(1)).due() == DropOrder(APP)


@pytest.mark.parametrize("is_away", [True, False])
async def test_a_question_that_fails_is_asked_again_later_and_says_nothing_about_the_account(
    is_away: bool,
) -> None:
    store, before = MemoryStore(SystemClock()), HostCertificate(name=APP, pem="pem", not_after_ns=10**19 // 2)
    await store.update(write_record, ACCOUNT_ID, ACCOUNT)
    await store.update(write_record, record_id(APP), before)
    failed = AcmeFailed(reason="the authority did not respond in time", is_away=is_away, is_over=not is_away)
    await store.update(note_outcome, ACCOUNT, before, failed, 7, 0.5)
    assert record_in(store.view(), APP) == replace(before, ask_at_ns=7 + int(ASK_S * 10**9))
    assert account_in(store.view()) == ACCOUNT


async def test_a_suggested_renewal_in_an_absurd_year_can_be_stored() -> None:
    store, before = MemoryStore(SystemClock()), HostCertificate(name=APP, pem="pem", not_after_ns=10**18)
    await store.update(write_record, ACCOUNT_ID, ACCOUNT)
    await store.update(write_record, record_id(APP), before)
    for renew_at_ns in (-(10**20), 10**20):
        await store.update(note_outcome, ACCOUNT, before, WindowKnown(renew_at_ns, 1e15), 7, 0.5)
        assert 0 <= record_in(store.view(), APP).renew_at_ns <= before.not_after_ns


async def test_an_order_is_not_continued_at_an_authority_that_was_set_since() -> None:
    store, asked = MemoryStore(SystemClock()), list[tuple[str, str]]()
    other, came = replace(ACCOUNT, directory="https://other/dir", key="other", url=""), asyncio.Event()
    order = CertificateOrder(key="k", began_ns=1, url="https://ca/order")
    record = HostCertificate(name=APP, order=order, tried=ACCOUNT.directory)
    await store.update(raise_level, LEVEL)
    await store.update(write_record, ACCOUNT_ID, ACCOUNT)
    await store.update(write_record, NAMES_ID, KnownNames((APP,)))
    await store.update(write_record, record_id(APP), record)

    async def confirm() -> None:
        await store.update(configure, other)

    async def run_step(account: AcmeAccount, record: HostCertificate | None) -> Outcome:
        asked.append((account.directory, record.name if record is not None else ""))
        came.set()
        return AcmeFailed(reason="it is away", is_away=True)

    loop = Certificates(store, SystemClock(), Random(1), run_step, confirm, lambda _: Wanted({APP: ""}))
    running = asyncio.create_task(loop.run())
    async with asyncio.timeout(10):
        await came.wait()
    running.cancel()
    await asyncio.wait([running])
    assert asked == [(other.directory, "")], "the account is registered first"
