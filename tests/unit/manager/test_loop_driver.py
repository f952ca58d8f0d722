"""The driver of the control loops: errors and refusals concern one key, and decisions pause."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from random import Random
from typing import TypeAlias

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import FailedPrecondition
from skep.manager.control_loops.failures import LONGEST_DELAY_S, Failures
from skep.manager.control_loops.loop_driver import RECHECK_S, Decision, LoopDriver, Recheck
from skep.manager.control_loops.work_queue import WorkQueue
from skep.store.interface import Commit, Created, Transaction, View
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore
from tests.support.harness.clocks import PausingVirtualClock

Decide: TypeAlias = Callable[[str], Decision[str]]


class State:
    """Every payload is a key, and ``seen`` has those that the state knows."""

    def __init__(self, clock: VirtualClock, decide: Decide) -> None:
        self.queue: WorkQueue[str] = WorkQueue(clock)
        self.failures = Failures(clock, Random(1))
        self.seen: set[str] = set()
        self.decided = Counter[str]()
        self._decide = decide

    def start(self, snapshot: View) -> Iterator[None]:
        self._add(snapshot.ids(Payload))
        yield

    def on_commit(self, commit: Commit) -> None:
        self._add([event.object.id for event in commit.events if isinstance(event, Created)])  # type: ignore[attr-defined]

    def _add(self, ids: "list[str] | tuple[str, ...]") -> None:
        self.seen.update(ids)
        self.queue.add(id for id in ids if not id.startswith("done-"))

    def decide(self, key: str) -> Decision[str]:
        self.decided[key] += 1
        yield from self._decide(key)


class Rig:
    """A loop that writes ``done-X`` for each change X of its decisions, unless X is in ``refused``."""

    def __init__(self, clock: Callable[[VirtualLoop], VirtualClock] = VirtualClock) -> None:
        self.loop = VirtualLoop()
        asyncio.set_event_loop(self.loop)
        self.clock = clock(self.loop)
        self.store = MemoryStore(self.clock)
        self.refused: set[str] = set()

    def run(self, decide: Decide, body: Callable[[State], Coroutine[None, None, None]]) -> State:
        state = State(self.clock, decide)
        driver = LoopDriver(self.store, self.clock, state, (Payload,), 10)

        def write(tx: Transaction, change: str) -> None:
            if change in self.refused:
                raise FailedPrecondition("not now")
            put(tx, f"done-{change}")

        async def work(keys: list[str]) -> None:
            await driver.write("changes", write, await driver.decide(keys, state.decide))

        async def live() -> None:
            running = asyncio.create_task(driver.run(work))
            await body(state)
            assert not running.done()
            running.cancel()
            await asyncio.wait([running])

        self.loop.run_until_complete(live())
        return state

    @property
    def done(self) -> set[str]:
        ids = self.store.view().ids(Payload)
        return {id.removeprefix("done-") for id in ids if id.startswith("done-")}


def put(tx: Transaction, id: str) -> None:
    tx.put(Payload(id=id))


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(getattr(request, "param", VirtualClock))
    yield rig
    rig.loop.close()
    asyncio.set_event_loop(None)


def test_an_error_in_one_decision_delays_its_key_alone_and_later_and_later(rig: Rig) -> None:
    def decide(key: str) -> Decision[str]:
        if key == "bad":
            raise RuntimeError("a defect")
        yield key

    async def body(state: State) -> None:
        await rig.store.update(lambda tx: [put(tx, id) for id in ("a", "bad", "z")])
        await asyncio.sleep(0.1)
        assert rig.done == {"a", "z"}
        await asyncio.sleep(10 * LONGEST_DELAY_S)

    state = rig.run(decide, body)
    assert (state.decided["a"], state.decided["z"]) == (1, 1)
    assert 10 < state.decided["bad"] < 30


def test_what_was_yielded_before_an_error_is_written(rig: Rig) -> None:
    def decide(key: str) -> Decision[str]:
        yield key
        raise RuntimeError("a defect")

    async def body(state: State) -> None:
        await rig.store.update(put, "a")
        await asyncio.sleep(0.1)

    rig.run(decide, body)
    assert rig.done == {"a"}


def test_a_refused_change_is_decided_again_until_it_is_written(rig: Rig) -> None:
    rig.refused.add("a")

    async def body(state: State) -> None:
        await rig.store.update(lambda tx: [put(tx, id) for id in ("a", "b")])
        await asyncio.sleep(5.0)
        assert rig.done == {"b"}
        assert 2 <= state.decided["a"] < 10
        rig.refused.clear()
        await asyncio.sleep(LONGEST_DELAY_S)
        assert rig.done == {"a", "b"}

    state = rig.run(lambda key: (key,), body)
    assert state.decided["b"] == 1


def test_a_recheck_is_due_at_its_time(rig: Rig) -> None:
    at: list[float] = []

    def decide(key: str) -> Decision[str]:
        at.append(rig.clock.monotonic())
        yield Recheck(7.0) if len(at) == 1 else key

    async def body(state: State) -> None:
        await rig.store.update(put, "a")
        await asyncio.sleep(10.0)

    rig.run(decide, body)
    assert at[1:] == [pytest.approx(7.0, abs=0.01)]
    assert rig.done == {"a"}


def test_a_recheck_in_the_past_is_made_after_a_pause(rig: Rig) -> None:
    def decide(key: str) -> Decision[str]:
        yield Recheck(-5.0)

    async def body(state: State) -> None:
        await rig.store.update(put, "a")
        await asyncio.sleep(1.0)

    state = rig.run(decide, body)
    assert 1 < state.decided["a"] <= 1 + 1.0 / RECHECK_S


@pytest.mark.parametrize("rig", [PausingVirtualClock], indirect=True)
def test_after_a_pause_the_state_knows_every_commit_that_the_view_shows(rig: Rig) -> None:
    states: list[State] = []
    unknown: list[set[str]] = []

    def decide(key: str) -> Decision[str]:
        for _ in range(50):
            yield None
            unknown.append(set(rig.store.view().ids(Payload)) - states[0].seen)

    async def body(state: State) -> None:
        states.append(state)
        for number in range(50):
            await rig.store.update(put, f"p{number}")
        await asyncio.sleep(1.0)

    rig.run(decide, body)
    assert len(unknown) == 50 * 50
    assert not any(unknown)
