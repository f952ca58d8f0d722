"""A bad object never stops a loop."""

from random import Random

import pytest
from structlog.testing import capture_logs

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import SystemClock
from skep.errors import NotFound, Unavailable
from skep.manager.control_loops.failures import (
    WRITE_FAILURES_MAX,
    BadObject,
    Failures,
    for_each_isolated,
    handle_isolated,
    isolating_errors,
    object_id,
    write_each,
)
from skep.model.secret import Config, ConfigSpec
from skep.model.values.ids import ConfigId, NodeId
from skep.store.interface import Commit, Created, NotLeader, Transaction
from skep.store.memory import MemoryStore


@pytest.fixture
def failures() -> Failures:
    loop = VirtualLoop()
    loop.close()
    return Failures(VirtualClock(loop), Random(1))


def test_an_error_ends_there_and_is_kept(failures: Failures) -> None:
    with failures.caught("web"):
        raise KeyError("an unexpected error")
    failure = failures.of("web")
    assert failure is not None
    assert failure.error == "KeyError: 'an unexpected error'"
    assert failures.of("other") is None


def test_each_failure_waits_longer_up_to_a_minute(failures: Failures) -> None:
    delays = []
    for _ in range(12):
        with failures.caught("web"):
            raise ValueError
        failure = failures.of("web")
        assert failure is not None
        delays.append(failure.retry_at)
    assert 0.25 <= delays[0] <= 0.5
    assert 30 <= delays[-1] <= 60


def test_an_error_is_logged_once_with_its_traceback_and_another_one_again(failures: Failures) -> None:
    errors = [KeyError("same"), KeyError("same"), ValueError("other")]
    with capture_logs() as logs:
        for error in errors:
            with failures.caught("web"):
                raise error
    assert [(line["event"], line["object"]) for line in logs] == [("decision failed", "web")] * 2
    assert [line["exc_info"] for line in logs] == [errors[0], errors[2]]


def test_success_clears_the_failure(failures: Failures) -> None:
    with failures.caught("web"):
        raise ValueError
    with failures.caught("web"):
        pass
    assert failures.of("web") is None


def test_the_end_of_the_term_is_not_held_back(failures: Failures) -> None:
    with pytest.raises(NotLeader), failures.caught("web"):
        raise NotLeader("another manager leads")


def test_a_change_that_breaks_fails_alone() -> None:
    def body(tx: object, item: str) -> str:
        if item == "bad":
            raise KeyError(item)
        if item == "gone":
            raise NotFound("gone")
        return item

    run = isolating_errors(body)
    assert run(None, "good") == "good"  # type: ignore[arg-type]
    with pytest.raises(BadObject, match="KeyError"):
        run(None, "bad")  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        run(None, "gone")  # type: ignore[arg-type]


async def test_of_many_changes_one_that_breaks_fails_alone() -> None:
    store = MemoryStore(SystemClock())
    one, other = await write_each(store, _put_good, [_config("bad"), _config("good")])
    assert isinstance(one, BadObject)
    assert other == store.view().get(Config, "good")


def test_a_store_that_does_not_answer_is_the_error_of_every_change() -> None:
    loop = VirtualLoop()
    store = MemoryStore(VirtualClock(loop))
    store.partition()
    results = loop.run_until_complete(write_each(store, _put_good, [_config("good"), _config("better")]))
    loop.close()
    assert [type(result) for result in results] == [Unavailable, Unavailable]


async def test_changes_of_a_term_that_is_over_are_not_made() -> None:
    store = MemoryStore(SystemClock())
    term = await anext(store.terms(NodeId("m1"), ""))
    other = MemoryStore(SystemClock(), store.cluster)
    store.cluster.stand(other, NodeId("m2"))
    store.cluster.elect(NodeId("m2"), quietly=True)
    with pytest.raises(NotLeader):
        await write_each(term, _put_good, [_config("good")])
    assert store.view().lookup(Config, "good") is None


def _config(id: str) -> Config:
    return Config(id=ConfigId(id), spec=ConfigSpec(name=id))


def _put_good(tx: Transaction, config: Config) -> Config:
    if config.id == "bad":
        raise KeyError(config.id)
    return tx.put(config)


def test_many_refusals_at_once_are_not_gone_through_for_each_of_them() -> None:
    class CountingClock(SystemClock):
        asked = 0

        def monotonic(self) -> float:
            self.asked += 1
            return 0.0

    clock = CountingClock()
    failures = Failures(clock, Random(1))
    count = 5 * WRITE_FAILURES_MAX
    for number in range(count):
        failures.record_write_failure(f"slot {number}", "web", Unavailable("no leader"))
    assert clock.asked < count + 10


def test_of_many_objects_one_that_cannot_be_taken_in_keeps_none_of_the_others_out() -> None:
    entered = []

    def enter(config: Config) -> None:
        if config.id in ("c1", "c4"):
            raise ValueError("odd")
        entered.append(config.id)

    configs = [Config(id=ConfigId(f"c{number}"), spec=ConfigSpec(name="x")) for number in range(1, 5)]
    with capture_logs() as logs:
        for_each_isolated("test of entering", configs, enter)
    assert entered == ["c2", "c3"]
    assert [line["object"] for line in logs] == ["c1", "c4"]


def test_a_commit_that_meets_a_bug_loses_the_bad_event_alone_and_says_so_once() -> None:
    entered = []

    def handle(commit: Commit) -> None:
        for event in commit.events:
            if object_id(event) == "odd":
                raise ValueError("odd")
            entered.append(object_id(event))

    commit = Commit(1, (Created(_config("odd")), Created(_config("sound"))))
    with capture_logs() as logs:
        for _ in range(2):
            handle_isolated("test of commits", handle, commit)
    assert entered == ["sound"] * 2
    assert [(line["event"], line["object"]) for line in logs] == [("event not handled", "odd")]
    assert all(line["exc_info"] for line in logs)


def test_that_the_term_is_over_is_nothing_about_an_object() -> None:
    def enter(_: Config) -> None:
        raise NotLeader("over")

    with pytest.raises(NotLeader):
        for_each_isolated("test of entering", [Config(id=ConfigId("c1"), spec=ConfigSpec(name="x"))], enter)


def test_an_expected_error_is_named_without_its_class(failures: Failures) -> None:
    failures.record("web", NotFound("network n1 not found"))
    failure = failures.of("web")
    assert failure is not None
    assert failure.error == "network n1 not found"
