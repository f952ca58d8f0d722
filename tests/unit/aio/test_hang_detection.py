"""When one who does not answer leads no more, and when its process is ended."""

from skep.aio.event_loop.hang_detection import AGAIN_S, CALM_S, LIMITS, HangAction, HangDetector

HAND_OVER_S, END_S = LIMITS.hand_over_s, LIMITS.end_s

TICK_S = 0.5


class Asking:
    def __init__(self) -> None:
        self.now = 0.0
        self.patience = HangDetector(TICK_S, 0.0)

    def silent(self, seconds: float) -> list[tuple[float, HangAction]]:
        """What is done, and how long after the silence began."""
        began, done = self.now, []
        while self.now < began + seconds:
            self.now += TICK_S
            step = self.patience.record(self.now, has_response=False)
            done += [(self.now - began, step)] if step is not HangAction.WAIT else []
            if step is HangAction.END:
                break
        return done

    def well(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += TICK_S
            assert self.patience.record(self.now, has_response=True) is HangAction.WAIT


def test_a_silent_one_leads_no_more_after_three_seconds_and_is_ended_after_fifteen() -> None:
    asking = Asking()
    asking.well(60)
    (first, *again), end = (done := asking.silent(100))[:-1], done[-1]
    assert first == (HAND_OVER_S, HangAction.HAND_OVER)
    assert end == (END_S, HangAction.END)
    assert again == [(HAND_OVER_S + n * AGAIN_S, HangAction.HAND_OVER) for n in range(1, 6)]


def test_a_short_silence_is_nothing() -> None:
    asking = Asking()
    for _ in range(100):
        asking.well(0.5)
        assert asking.silent(HAND_OVER_S - TICK_S) == []


def test_a_pause_of_the_prober_is_not_counted_as_a_hang() -> None:
    """A suspend, or both were stopped."""
    asking = Asking()
    asking.well(10)
    asking.now += 3600
    assert asking.patience.record(asking.now, has_response=False) is HangAction.WAIT
    asking.well(10)
    assert asking.silent(2) == []


def test_one_that_is_slow_again_and_again_keeps_its_leader_for_longer_each_time() -> None:
    asking = Asking()
    asked_after = []
    for _ in range(3):
        asking.well(30)
        asked_after += [after for after, _ in asking.silent(14)][:1]
    assert asked_after == [HAND_OVER_S, 2 * HAND_OVER_S, 4 * HAND_OVER_S]
    asking.well(30)
    assert asking.silent(14) == []
    asking.well(CALM_S + 1)
    assert asking.silent(4) == [(HAND_OVER_S, HangAction.HAND_OVER)]


def test_a_silent_one_loses_its_leadership_again_as_it_may_have_come_back() -> None:
    asking = Asking()
    asking.well(60)
    assert [after for after, _ in asking.silent(8)] == [
        HAND_OVER_S,
        HAND_OVER_S + AGAIN_S,
        HAND_OVER_S + 2 * AGAIN_S,
    ]
