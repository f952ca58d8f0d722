"""The journal on a store: nothing lost or told twice over a change of leader, bounds, and the state of then."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import InvalidArgument
from skep.manager.journal.chunks import entries_in, of_changes
from skep.manager.journal.loop import Journal
from skep.manager.journal.past import PastStates
from skep.manager.journal.reading import LIMIT_MAX, HistoryQuery, page
from skep.model.history import By, EntryType, JournalEntry
from skep.model.options.labels import HISTORY
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import TaskState, TaskStatus
from skep.model.values.ids import NodeId
from skep.store.interface import HistoryGone, NotLeader, Store, Term, Transaction, View
from skep.store.kinds import JournalChunk
from skep.store.level import JOURNAL
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.store.store_rigs import FIRST, SECOND, EtcdRig, MemoryRig, Rig, etcd_rig, found, memory_rig
from tests.support.store.store_transactions import a_secret, change, eventually, put

pytestmark = pytest.mark.timeout(60)


class QuickClock(SystemClock):
    """Waits a moment where the journal gathers entries."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))


@asynccontextmanager
async def journal_on(store: Store, own: NodeId) -> AsyncIterator[Journal]:
    journal = Journal(store, own, QuickClock(), Random(1))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(journal.run())
        try:
            yield journal
        finally:
            running.cancel()


@asynccontextmanager
async def leading(journal: Journal, term: Term) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        lead = group.create_task(journal.lead(term))
        try:
            yield
        finally:
            lead.cancel()


async def entries(view: View, kind: EntryType = EntryType.CHANGE) -> Sequence[JournalEntry]:
    """All of them, oldest first."""
    query = HistoryQuery(kinds=frozenset({kind}), limit=LIMIT_MAX, is_ascending=True)
    return (await page(view, query)).entries


async def wait_entries(
    store: Store, count: int, kind: EntryType = EntryType.CHANGE
) -> Sequence[JournalEntry]:
    while len(found := await entries(store.view(), kind)) < count:  # noqa: ASYNC110 - as eventually
        await asyncio.sleep(0.005)
    return found


async def test_changes_and_requests_are_kept_by_the_leader_and_read_by_all(rig: Rig) -> None:
    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    async with (
        journal_on(rig.store, FIRST) as first,
        journal_on(rig.other, SECOND) as second,
        leading(first, term),
    ):
        await rig.store.update(put, a_secret("s1"))
        await rig.other.update(put, a_service("web"))
        second.record(
            JournalEntry(type="service", action="create", message="create service web", by=By(user="root"))
        )
        told = [one.message for one in await wait_entries(rig.other, 2)]
        assert told == ["secret s1 created", "service web created: 1 × busybox:1, replicated"]
        (asked,) = await wait_entries(rig.store, 1, EntryType.REQUEST)
        assert (asked.message, asked.by) == ("create service web", By(user="root"))


async def test_a_change_of_leader_neither_loses_an_entry_nor_repeats_one() -> None:
    async with memory_rig() as rig:
        assert isinstance(rig, MemoryRig)
        terms, later = rig.store.terms(FIRST, "a:1"), rig.other.terms(SECOND, "b:1")
        term = await anext(terms)
        async with journal_on(rig.store, FIRST) as first, journal_on(rig.other, SECOND) as second:
            async with leading(first, term):
                await rig.store.update(put, a_secret("s1"))
                await wait_entries(rig.store, 1)
            # The first does not write any more: what happens now is known to both, and written by neither.
            for number in (2, 3, 4):
                await rig.store.update(put, a_secret(f"s{number}"))
            following = asyncio.ensure_future(anext(later))
            await asyncio.sleep(0)
            await rig.depose()
            async with leading(second, await following):
                await rig.other.update(put, a_secret("s5"))
                await wait_entries(rig.other, 5)
                await rig.store.update(put, a_secret("s6"))
                with pytest.raises(NotLeader):  # it believes to lead still
                    await first.lead(term)
                found = await wait_entries(rig.other, 6)
        assert [one.name for one in found] == [f"s{number}" for number in range(1, 7)]


async def test_what_no_manager_saw_is_reported_by_an_entry(rig: Rig) -> None:
    terms = rig.store.terms(FIRST, "127.0.0.1:2377")
    term = await anext(terms)
    async with journal_on(rig.store, FIRST) as journal, leading(journal, term):
        await rig.store.update(put, a_secret("s1"))
        await wait_entries(rig.store, 1)
    await rig.store.update(put, a_secret("s2"))
    async with journal_on(rig.store, FIRST) as journal:
        journal.record(JournalEntry(action="create"))
        async with leading(journal, term):
            await rig.store.update(put, a_secret("s3"))
            told = [one.name or one.action for one in await wait_entries(rig.store, 3)]
    assert told == ["s1", "lost-entries", "s3"]
    # Those of its end are written as it ends.
    assert [one.action for one in await entries(rig.store.view(), EntryType.REQUEST)] == ["create"]


async def test_the_journal_stays_within_the_bounds_of_the_cluster(rig: Rig) -> None:
    def limit(tx: Transaction, entries: int) -> None:
        (swarm,) = tx.find(Swarm)
        tx.put(replace(swarm, spec=replace(swarm.spec, labels={HISTORY: str(entries)})))

    await rig.store.update(limit, 200)
    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    async with journal_on(rig.store, FIRST) as journal, leading(journal, term):
        for number in range(300):
            await rig.store.update(put, a_secret(f"s{number:03}"))
        await eventually(lambda: journaled_names(rig.store.view())[-1:] == ["s299"])
        await eventually(lambda: len(journaled_names(rig.store.view())) <= 150)
        names = journaled_names(rig.store.view())
        assert len(names) >= 100
        assert names == [f"s{number:03}" for number in range(300 - len(names), 300)]
        kept = len(rig.store.view().find(JournalChunk))
        await rig.store.update(limit, 0)
        before = rig.store.view().revision
        await eventually(lambda: not rig.store.view().find(JournalChunk))
        assert kept > 1
        assert rig.store.view().revision == before + 1  # all in one transaction


async def test_nothing_is_journaled_before_every_manager_supports_the_journal() -> None:
    rig = MemoryRig()
    await rig.store.update(found)
    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    async with journal_on(rig.store, FIRST) as journal, leading(journal, term):
        await rig.store.update(put, a_secret("early"))
        journal.record(JournalEntry(type="service", action="create", message="early"))
        assert not rig.store.view().find(JournalChunk)
        await rig.store.update(lambda tx: tx.raise_level(JOURNAL))
        await rig.store.update(put, a_secret("late"))
        journal.record(JournalEntry(type="service", action="create", message="late"))
        await eventually(lambda: journaled_names(rig.store.view()) == ["late"])
        (asked,) = await wait_entries(rig.store, 1, EntryType.REQUEST)
        assert asked.message == "late"


def journaled_names(view: View) -> list[str]:
    return [one.name for chunk in of_changes(view) for one in entries_in(chunk) if one.type == "secret"]


# -- the state of then ---------------------------------------------------------------------------------------


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[Rig]:
    async with etcd_rig(tmp_path) as rig:
        yield rig


@pytest.mark.needs("etcd", "setpriv")
async def test_the_next_leader_goes_on_where_the_last_one_ended(etcd: Rig) -> None:
    terms, later = etcd.store.terms(FIRST, "127.0.0.1:2377"), etcd.other.terms(SECOND, "127.0.0.1:2378")
    term = await anext(terms)
    async with journal_on(etcd.store, FIRST) as first, journal_on(etcd.other, SECOND) as second:
        async with leading(first, term):
            await etcd.store.update(put, a_secret("s1"))
            await wait_entries(etcd.store, 1)
        following = asyncio.ensure_future(anext(later))
        for number in (2, 3, 4):
            await etcd.store.update(put, a_secret(f"s{number}"))
        await terms.aclose()  # type: ignore[attr-defined]
        assert isinstance(etcd, EtcdRig)
        await etcd.give_up_leadership()
        async with leading(second, await following):
            await etcd.other.update(put, a_secret("s5"))
            found = await wait_entries(etcd.other, 5)
    assert [one.name for one in found] == [f"s{number}" for number in range(1, 6)]


@pytest.mark.needs("etcd", "setpriv")
async def test_the_objects_of_an_earlier_revision_are_read_from_etcd(etcd: Rig) -> None:
    store = etcd.store
    web = a_service("web", spec=a_service_spec("web", image="busybox:1"))
    await store.update(put, web)
    await store.update(put, a_node("n1"))
    task = a_task("t1", service=web.id, node="n1")
    await store.update(put, task)
    before = store.view().revision
    spec = a_service_spec("web", image="busybox:2")
    await store.update(change, Service, web.id, spec=spec)
    await store.update(change, type(task), "t1", status=TaskStatus(state=TaskState.FAILED))
    await store.rotate_data_key()
    past = await store.state_at(before)
    container = past.get(Service, web.id).spec.task_template.container_spec
    assert container is not None
    assert container.image == "busybox:1"
    assert [one.status.state for one in past.find(type(task), service_id=web.id)] == [TaskState.RUNNING]
    assert past.revision == before
    assert await store.oldest_revision() <= before
    await etcd.compact()
    with pytest.raises(HistoryGone):
        await store.state_at(before)
    oldest = await store.oldest_revision()
    assert before < oldest <= store.view().revision
    assert (await store.state_at(oldest)).find(Service)


@pytest.mark.needs("etcd", "setpriv")
async def test_a_time_is_the_state_of_then_or_refused_with_the_oldest(etcd: Rig) -> None:
    store, clock = etcd.store, MovedClock()
    term = await anext(store.terms(FIRST, "127.0.0.1:2377"))
    journal = Journal(store, FIRST, clock, Random(1))
    past = PastStates(store, journal.marks, clock)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(journal.run())
        async with leading(journal, term):
            for number in range(3):
                clock.minutes = number
                await store.update(put, a_service(f"web{number}"))
                await wait_entries(store, number + 1)
            clock.minutes = 10
            names = [service.spec.name for service in (await past.at(clock.minute(1))).view.find(Service)]
            assert names == ["web0", "web1"]
            assert len((await past.at("revision:" + str(store.view().revision))).view.find(Service)) == 3
            assert await past.oldest()
            with pytest.raises(HistoryGone, match="no longer in the store"):
                await past.at(clock.minute(-60))
            with pytest.raises(InvalidArgument, match="is in the future"):
                await past.at(clock.minute(60))
            with pytest.raises(InvalidArgument, match=r"^999999999999999999 is in the future"):
                await past.at("999999999999999999")  # in the year 31688740475
            with pytest.raises(InvalidArgument, match="does not exist yet"):
                await past.at("revision:999999999")
        running.cancel()


class MovedClock(QuickClock):
    """A clock at whole minutes."""

    minutes = 0

    def now_ns(self) -> int:
        return self._at(self.minutes)

    def minute(self, number: int) -> str:
        """Half a minute later, in seconds since 1970."""
        return str(self._at(number) // 10**9 + 30)

    @staticmethod
    def _at(minutes: int) -> int:
        return (1_800_000_000 + 60 * minutes) * 10**9
