"""Times of actions on containers."""

import pytest

from skep.api.telemetry.exposition import render
from skep.engine.metrics.usage import ActionTimes, timed
from tests.unit.manager.membership.test_votes import HandClock


class Engine:
    def __init__(self, clock: HandClock) -> None:
        self.clock, self.action_times = clock, ActionTimes(clock)

    @timed("start")
    async def start(self, seconds: float) -> str:
        self.clock.time += seconds
        if seconds > 1:
            raise ValueError("too slow")
        return "started"


async def test_actions_that_succeed_are_counted_with_their_time() -> None:
    engine = Engine(HandClock())
    assert await engine.start(0.25) == "started"
    with pytest.raises(ValueError, match="too slow"):
        await engine.start(2.0)
    text = render([engine.action_times.family()]).decode()
    assert 'engine_daemon_container_actions_seconds_bucket{action="start",le="0.1"} 0' in text
    assert 'engine_daemon_container_actions_seconds_bucket{action="start",le="0.25"} 1' in text
    assert 'engine_daemon_container_actions_seconds_count{action="start"} 1' in text
    assert 'engine_daemon_container_actions_seconds_count{action="delete"} 0' in text
