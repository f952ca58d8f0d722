"""Random runs of the store alone."""

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from sim.seeds import chunked, report, results
from sim.store_only.managers import WANT
from sim.store_only.run import elections, simulate
from sim.store_only.world import StoreWorld
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.reflector import Reflector
from skep.store.kinds import Payload
from skep.store.transactions.updates import TERM_DEADLINE_S

SEEDS = 1000
QUICK = 100
CHUNK = 100


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(seeds[0], marks=pytest.mark.slow if seeds[0] >= QUICK else ())
        for seeds in chunked(range(SEEDS), CHUNK)
    ],
)
def test_responses_of_the_store_are_linearizable_and_replicas_converge(first: int) -> None:
    failed = [report(one) for one in results(range(first, first + CHUNK), simulate) if one.violations]
    assert not failed, "\n\n".join(failed)


def test_leaders_that_are_cut_off_before_they_write_their_key_never_take_it_back() -> None:
    failed = [report(one) for one in results(range(QUICK), elections) if one.violations]
    assert not failed, "\n\n".join(failed)


def test_a_deletion_counts_as_applied_only_if_no_other_manager_made_it() -> None:
    """Of a manager that lagged, and lost the answer to its deletion: the one that it saw was another's."""
    (result,) = results([3559], simulate)
    assert not result.violations, report(result)


@pytest.fixture
def calm() -> Iterator[StoreWorld]:
    """One manager that leads, and in which nothing breaks by itself."""
    run = StoreWorld(next(seed for seed in range(20) if len(StoreWorld(seed).ids) == 1))
    asyncio.set_event_loop(run.loop)
    (id,) = run.ids
    run.raft.add(id)
    run.raft.start(id)
    run.do(run.initialize())
    run.start(id)
    run.wait_healthy()
    try:
        yield run
    finally:
        run.end()


@pytest.mark.parametrize("behind_s", [5.0, 21.0, 45.0])
def test_an_acknowledged_write_that_does_not_show_yet_is_not_decided_again(
    calm: StoreWorld, behind_s: float
) -> None:
    """The leader's watch is behind for longer than its update waits, while its writes are answered."""
    (member,) = calm.raft.members.values()
    (manager,) = calm.managers.values()
    assert manager.store is not None
    wants = [f"{WANT}{number}" for number in range(3)]
    member.stall_s = 1.0
    calm.do(manager.store.update_each(lambda tx, name: tx.put(Payload(id=name)), wants))
    calm.run_for(0.5)  # the number of the first is on its way
    member.watch_lag_s = behind_s
    calm.run_for(1.0)
    member.stall_s = 0.0
    calm.run_for(behind_s)
    member.watch_lag_s = 0.0
    calm.run_for(behind_s + 2 * TERM_DEADLINE_S)
    assert not calm.violations
    numbers = [calm.committed.view.get(Payload, name).data for name in wants]
    assert sorted(numbers) == [b"1", b"2", b"3"]


def test_a_seed_gives_the_same_run_twice() -> None:
    (one,) = results([7], simulate)
    (other,) = results([7], simulate)
    assert one.trace == other.trace
    assert len(one.trace) > 20


def test_runs_of_the_store_cover_all_faults_and_requests() -> None:
    reported = [line for result in results(range(20), simulate) for line in result.trace]
    for word in (
        "hang",
        "crash",
        "member",
        "reset",
        "slow",
        "lags",
        "cut off",
        "split",
        "frozen",
        "compaction",
        "data key",
    ):
        assert any(word in line for line in reported), word


def test_changes_are_taken_in_where_they_arrive_and_fragments_are_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, fragments = Counter[bool](), 0
    offered, checked = Reflector._apply_at_once, Reflector._check

    def offer(self: Reflector, response: pb.WatchResponse) -> bool:
        is_taken = offered(self, response)
        taken[is_taken] += 1
        return is_taken

    def check(self: Reflector, response: pb.WatchResponse) -> None:
        nonlocal fragments
        fragments += response.fragment
        checked(self, response)

    monkeypatch.setattr(Reflector, "_apply_at_once", offer)
    monkeypatch.setattr(Reflector, "_check", check)
    failed = [result.violations for result in results(range(3, 20), simulate) if result.violations]
    assert not failed
    assert taken[True] > 500
    assert fragments > 0
