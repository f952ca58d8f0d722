"""Durations of container actions, as the metric ``engine_daemon_container_actions_seconds`` reports them.

Only successful actions count.  Source: moby, daemon/metrics.go.
"""

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from skep.aio.clock import Clock
from skep.api.telemetry.exposition import Histogram, MetricFamily

P = ParamSpec("P")
R = TypeVar("R")

ACTIONS = ("changes", "commit", "create", "delete", "start")
_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Upper bounds of the histogram's buckets in seconds: the defaults of Prometheus' Go library, which dockerd uses."""


class ActionTimes:
    """Action durations of one engine since its process began."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._histograms = {action: Histogram(_BOUNDS_S) for action in ACTIONS}

    @contextmanager
    def timed(self, action: str) -> Iterator[None]:
        """Measure the duration of the block as ``action`` (one of ``ACTIONS``), unless the block raises."""
        began = self._clock.monotonic()
        yield
        self._histograms[action].observe(self._clock.monotonic() - began)

    def family(self) -> MetricFamily:
        """Return the metric family, with one histogram per action."""
        samples = [
            sample for action, each in self._histograms.items() for sample in each.samples({"action": action})
        ]
        return MetricFamily(
            "engine_daemon_container_actions_seconds",
            "histogram",
            "Time of actions on containers that succeeded.",
            samples,
        )


class HasActionTimes(Protocol):
    """An engine with ``action_times``."""

    action_times: ActionTimes


S = TypeVar("S", bound=HasActionTimes)
Method = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def timed(action: str) -> Callable[[Method[S, P, R]], Method[S, P, R]]:
    """Time each call of a method as ``action``."""

    def decorate(method: Method[S, P, R]) -> Method[S, P, R]:
        @wraps(method)
        async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            with self.action_times.timed(action):
                return await method(self, *args, **kwargs)

        return call

    return decorate
