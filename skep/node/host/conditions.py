"""Conditions of this node: its present problems.  Each has a name, a message, and one part that sets it.

Level-triggered: ``set`` reports the present state and may be repeated.  Each condition appears at once as a warning in
``/info`` (and so in ``skep status``).  The node's description carries it to the managers as an engine label.  They show
it in the node's status message and events, and a placement constraint can avoid the node
(``engine.labels.skep.condition.disk``).
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.model.node_reports.conditions import (
    CHARACTERS_MAX,
    CONDITIONS_MAX,
    ConditionName,
    condition_label,
)

log = structlog.get_logger()

LABEL_SECONDS_MIN = 30.0
"""Shortest time in seconds from the start of a condition to the end of its label.

Each change of the labels is a write in the cluster's store, and a condition may come and go often.  The label of a
condition that lasted longer ends at once.  Otherwise a node would get no tasks although its disk has space again.
"""


class _Condition(msgspec.Struct):
    message: str
    labeled_at: float
    """Time at which its label appeared."""
    cleared_at: float | None = None


class Conditions:
    """The conditions of one node.  Any thread may set and clear them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._conditions: dict[str, _Condition] = {}
        self._lock = threading.Lock()

    def set(self, name: str, message: str) -> None:
        """Set a condition.

        A condition that continues may get another message.  Each changed message is logged.

        Args:
            name: Lower-case words with dashes.
            message: A sentence about the problem and what to do, without a full stop.
        """
        message = message[:CHARACTERS_MAX]
        with self._lock:
            self._drop_ended()
            before = self._conditions.get(name)
            labeled_at = before.labeled_at if before is not None else self._clock.monotonic()
            self._conditions[name] = _Condition(message, labeled_at)
        if before is None or before.cleared_at is not None or before.message != message:
            log.warning("condition", name=name, message=message)

    def clear(self, name: str) -> None:
        """Clear the condition.  Does nothing if it is not set."""
        with self._lock:
            condition = self._conditions.get(name)
            if condition is None or condition.cleared_at is not None:
                return
            condition.cleared_at = self._clock.monotonic()
        log.info("condition cleared", name=name)

    def drop(self, name: str) -> None:
        """Clear the condition and its label, because another condition that begins now says more."""
        with self._lock:
            dropped = self._conditions.pop(name, None)
        if dropped is not None and dropped.cleared_at is None:
            log.info("condition cleared", name=name)

    def forget_ended(self) -> None:
        """Drop the labels of cleared conditions.

        Called for a new cluster, whose managers have not seen the conditions.
        """
        with self._lock:
            self._conditions = {name: one for name, one in self._conditions.items() if one.cleared_at is None}

    def reporter(self, name: ConditionName) -> Callable[[str], None]:
        """Return a function that sets the condition's message to its argument, and clears the condition if that is
        empty.
        """
        return partial(self.report, name)

    def report(self, name: ConditionName, message: str) -> None:
        """Set the condition to ``message``, or clear it if that is empty."""
        if message:
            self.set(name, message)
        else:
            self.clear(name)

    def present(self) -> Mapping[str, str]:
        """Return the messages of present conditions by name."""
        with self._lock:
            return {name: one.message for name, one in self._conditions.items() if one.cleared_at is None}

    def warnings(self) -> tuple[str, ...]:
        """Return the present conditions' messages for ``/info``."""
        return tuple(message for _, message in sorted(self.present().items()))

    def labels(self) -> Mapping[str, str]:
        """Return the engine labels of present conditions, and of short conditions that have just ended.

        A manager that reads the labels is a manager that the node reaches, so ``manager-unreachable`` has no label.
        """
        with self._lock:
            self._drop_ended()
            named = [
                item for item in self._conditions.items() if item[0] != ConditionName.MANAGER_UNREACHABLE
            ]
            labeled = sorted(named)[:CONDITIONS_MAX]
            return {condition_label(name): one.message for name, one in labeled}

    def _drop_ended(self) -> None:
        """Drop cleared conditions whose label has been there for long enough."""
        oldest = self._clock.monotonic() - LABEL_SECONDS_MIN
        self._conditions = {
            name: one
            for name, one in self._conditions.items()
            if one.cleared_at is None or one.labeled_at > oldest
        }
