"""A bad object never stops a loop."""

from random import Random

import pytest

from skep.errors import NotFound
from skep.manager.guard import BadObject, Guard, contained
from skep.sim.time import VirtualClock, VirtualLoop
from skep.store.interface import NotLeader


@pytest.fixture
def guard() -> Guard:
    loop = VirtualLoop()
    loop.close()
    return Guard(VirtualClock(loop), Random(1))


def test_an_error_ends_there_and_is_kept(guard: Guard) -> None:
    with guard.guarded("web"):
        raise KeyError("what nobody foresaw")
    trouble = guard.trouble("web")
    assert trouble is not None
    assert trouble.error == "KeyError: 'what nobody foresaw'"
    assert guard.trouble("other") is None


def test_each_failure_waits_longer_up_to_a_minute(guard: Guard) -> None:
    delays = []
    for _ in range(12):
        with guard.guarded("web"):
            raise ValueError
        trouble = guard.trouble("web")
        assert trouble is not None
        delays.append(trouble.retry_at)
    assert 0.25 <= delays[0] <= 0.5
    assert 30 <= delays[-1] <= 60


def test_success_ends_the_trouble(guard: Guard) -> None:
    with guard.guarded("web"):
        raise ValueError
    with guard.guarded("web"):
        pass
    assert guard.trouble("web") is None


def test_the_end_of_the_term_is_not_held_back(guard: Guard) -> None:
    with pytest.raises(NotLeader), guard.guarded("web"):
        raise NotLeader("another manager leads")


def test_a_change_that_breaks_fails_alone() -> None:
    def body(tx: object, item: str) -> str:
        if item == "bad":
            raise KeyError(item)
        if item == "gone":
            raise NotFound("gone")
        return item

    run = contained(body)
    assert run(None, "good") == "good"  # type: ignore[arg-type]
    with pytest.raises(BadObject, match="KeyError"):
        run(None, "bad")  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        run(None, "gone")  # type: ignore[arg-type]
