"""Errors that end the work of one object only."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from structlog.testing import capture_logs

from skep.aio.clock import SystemClock
from skep.aio.failures import CHARACTERS_MAX, Rounds, describe_error, isolate, retry
from skep.errors import Unavailable


class Bug(Exception):
    pass


class StepClock(SystemClock):
    """Does not wait, and notes for how long it was to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(*errors: Exception) -> Callable[[], Coroutine[None, None, int]]:
    """Work that fails with each of ``errors`` and then gives 7."""
    left = list(errors)

    async def work() -> int:
        if left:
            raise left.pop(0)
        return 7

    return work


async def test_contained_work_gives_its_result():
    assert await isolate(failing()(), "x failed") == 7


@pytest.mark.parametrize(
    "error", [Bug("b"), RecursionError(), MemoryError(), OSError(28, "full"), ExceptionGroup("g", [Bug()])]
)
async def test_any_error_is_contained_logged_with_its_traceback_and_reported(error: Exception):
    reported: list[Exception] = []
    with capture_logs() as lines:
        async with asyncio.TaskGroup() as group:
            neighbor = group.create_task(asyncio.sleep(0, "alive"))
            group.create_task(
                isolate(failing(error)(), "probe failed", on_error=reported.append, container="c")
            )
    assert neighbor.result() == "alive"
    assert reported == [error]
    assert [(line["event"], line["container"]) for line in lines] == [("probe failed", "c")]
    assert lines[0]["exc_info"] is error


async def test_a_cancellation_is_no_error():
    async def forever() -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(isolate(forever(), "x failed"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_is_tried_again_with_growing_pauses_until_it_works():
    clock = StepClock()
    errors = [Bug("same")] * 6
    with capture_logs() as lines:
        work = retry(failing(*errors), "not freed", clock=clock, first_s=1, longest_s=8, rng=lambda: 1.0)
        assert await work == 7
    assert clock.slept == [1, 2, 4, 8, 8, 8]
    assert [line["event"] for line in lines if line["log_level"] != "debug"] == ["not freed", "recovered"]
    assert lines[0]["exc_info"] is errors[0]


async def test_another_error_is_another_line():
    with capture_logs() as lines:
        await retry(
            failing(Bug("one"), Bug("one"), Bug("two")), "not freed", clock=StepClock(), rng=lambda: 1.0
        )
    assert [line["error"] for line in lines if line["log_level"] == "error"] == ["Bug: one", "Bug: two"]


async def test_work_that_went_well_for_long_is_tried_again_soon():
    clock = StepClock()
    ends = iter([0, 0, 100, None])

    async def work() -> None:
        lasts = next(ends)
        if lasts is None:
            return
        clock.now += lasts
        raise Bug

    await retry(work, "component ended", clock=clock, first_s=1, longest_s=60, rng=lambda: 1.0)
    assert clock.slept == [1, 2, 1]


def test_work_that_is_due_in_every_round_is_attempted_less_often_and_logged_once_while_it_fails():
    clock = StepClock()
    rounds = Rounds("log not rotated", clock, first_s=1, longest_s=4, rng=lambda: 1.0)
    errors: dict[str, Exception | None] = {"a": Bug("full"), "b": None}
    attempts: dict[str, list[float]] = {"a": [], "b": []}

    def work(key: str) -> None:
        attempts[key].append(clock.now)
        if (error := errors[key]) is not None:
            raise error

    with capture_logs() as lines:
        for second in range(20):
            clock.now = float(second)
            if second == 8:
                errors["a"] = OSError(5, "damaged")
            if second == 15:
                errors["a"] = None
            for key in attempts:
                rounds.attempt(key, lambda key=key: work(key), container=key)
    assert attempts == {"a": [0, 1, 3, 7, 11, 15, 16, 17, 18, 19], "b": list(range(20))}
    shown = [line for line in lines if line["log_level"] != "debug"]
    assert [(line["event"], line["container"]) for line in shown] == [
        ("log not rotated", "a"),
        ("log not rotated", "a"),
        ("recovered", "a"),
    ]
    assert [line["error"] for line in shown[:2]] == ["Bug: full", "damaged"]
    assert all(line["exc_info"] for line in shown[:2])


def test_an_object_that_is_gone_is_not_remembered():
    clock = StepClock()
    rounds = Rounds("log not rotated", clock)
    with capture_logs() as lines:
        for _ in range(2):
            rounds.attempt("a", lambda: 1 / 0)
            rounds.keep({"b"})
    assert [line["event"] for line in lines] == ["log not rotated"] * 2


async def test_some_errors_are_the_callers():
    with pytest.raises(Unavailable):
        await retry(failing(Unavailable("x")), "x", clock=StepClock(), passes=(Unavailable,))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Unavailable("no leader"), "no leader"),
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device"),
        (OSError("odd"), "OSError: odd"),
        (ExceptionGroup("g", [ExceptionGroup("h", [ValueError("v")])]), "ValueError: v"),
        (ValueError("9" * 5000), "ValueError: " + "9" * (CHARACTERS_MAX - 12)),
    ],
)
def test_an_error_is_explained_in_a_short_line(error: Exception, text: str):
    assert describe_error(error) == text
