"""What users do to services in the traces, and what of a trace counts.

A scenario is a list of actions; each runs until nothing has changed for a while.  A trace is every change that an
observer of the API sees meanwhile: of a task its desired and its observed state, of the service its update status.
``told`` extracts from a trace what does not depend on timing.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.model.container import ContainerSpec
from skep.model.service import (
    ReplicatedService,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
)
from skep.model.values.times import SECOND_NS

GOOD, BETTER, CRASHES, MISSING = "good", "better", "crashes", "missing"
"""Images: two that run, one whose tasks fail after ``CRASHES_AFTER_S``, one that cannot be had."""
CRASHES_AFTER_S = 0.3
DELAY_S = 0.5
MONITOR_S = 1.0
QUIET_S = 2.5
"""Longer than any delay above: what has not changed for so long has come to rest."""
LONGEST_S = 40.0
NO_UPDATE = "none"
"""A short state between two updates, which a slow observer misses."""


class Create(msgspec.Struct, frozen=True):
    spec: ServiceSpec


class Update(msgspec.Struct, frozen=True):
    spec: ServiceSpec


class Act(msgspec.Struct, frozen=True):
    """``crash``: the process of the task in slot 1 is killed; ``drain``: the only node is; the rest is a user's."""

    what: Literal["rollback", "crash", "drain", "activate", "remove"]


Action: TypeAlias = Create | Update | Act


class Scenario(msgspec.Struct, frozen=True):
    name: str
    actions: tuple[Action, ...]


class Seen(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change: of the ``task`` (``<slot>.<number in the slot, oldest first>``), or of the update if that is empty.

    ``state`` "gone": the task is not listed any more.  Task ids in ``message`` are replaced by their names.
    """

    at_s: float
    state: str
    task: str = ""
    desired: str = ""
    message: str = ""


class Observed(msgspec.Struct, frozen=True):
    """The part of a trace that is the same for every implementation."""

    slots: dict[str, tuple[str, ...]]
    """Slot -> its tasks that came to run, oldest first: in which state each is seen last."""
    together: tuple[str, ...]
    """Slots in which two tasks ran at one time."""
    updates: tuple[str, ...]
    """The states of updates, one after the other, and the last message."""


def a_spec(image: str = GOOD, *, replicas: int = 2, update: UpdateConfig | None = None) -> ServiceSpec:
    restart = RestartPolicy(
        condition=RestartCondition.ANY, delay=int(DELAY_S * SECOND_NS), max_attempts=1, window=0
    )
    container = ContainerSpec(image=image, stop_grace_period=2 * SECOND_NS)
    return ServiceSpec(
        name="web",
        task_template=TaskSpec(container_spec=container, restart_policy=restart),
        mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)),
        update_config=update or _config(),
        rollback_config=_config(),
    )


def _config(
    order: UpdateOrder = UpdateOrder.STOP_FIRST, action: UpdateFailureAction = UpdateFailureAction.PAUSE
) -> UpdateConfig:
    return UpdateConfig(parallelism=1, order=order, failure_action=action, monitor=int(MONITOR_S * SECOND_NS))


START_FIRST = _config(UpdateOrder.START_FIRST)
ROLLS_BACK = _config(action=UpdateFailureAction.ROLLBACK)
GOES_ON = _config(action=UpdateFailureAction.CONTINUE)

SCENARIOS = (
    Scenario("create", (Create(a_spec()),)),
    Scenario(
        "scale",
        (
            Create(a_spec()),
            Update(a_spec(replicas=3)),
            Update(a_spec(replicas=1)),
            Update(a_spec(replicas=2)),
        ),
    ),
    Scenario("update, stop-first", (Create(a_spec()), Update(a_spec(BETTER)))),
    Scenario(
        "update, start-first",
        (Create(a_spec(update=START_FIRST)), Update(a_spec(BETTER, update=START_FIRST))),
    ),
    Scenario(
        "the same again", (Create(a_spec()), Update(a_spec()), Update(replace(a_spec(), labels={"a": "b"})))
    ),
    Scenario("rollback", (Create(a_spec()), Update(a_spec(BETTER)), Act("rollback"), Act("rollback"))),
    Scenario("failing update, pause", (Create(a_spec()), Update(a_spec(CRASHES)), Update(a_spec(BETTER)))),
    Scenario(
        "failing update, rollback",
        (Create(a_spec(update=ROLLS_BACK)), Update(a_spec(CRASHES, update=ROLLS_BACK))),
    ),
    Scenario(
        "failing update, continue", (Create(a_spec(update=GOES_ON)), Update(a_spec(CRASHES, update=GOES_ON)))
    ),
    Scenario("missing image, pause", (Create(a_spec()), Update(a_spec(MISSING)))),
    Scenario("crash", (Create(a_spec()), Act("crash"), Act("crash"))),
    Scenario("drain", (Create(a_spec()), Act("drain"), Act("activate"))),
    Scenario("remove", (Create(a_spec()), Act("remove"))),
)


class Observer:
    """Notes what changed since it looked last.  ``look`` gets every task as (id, slot, stamp, desired, observed)."""

    def __init__(self) -> None:
        self.trace: list[Seen] = []
        self._names: dict[str, str] = {}
        self._tasks: dict[str, tuple[str, str]] = {}
        self._update = ("", "")

    def look(
        self, at_s: float, tasks: Iterable[tuple[str, int, str, str, str]], update: tuple[str, str]
    ) -> None:
        present = {}
        for id, slot, _, desired, state in sorted(tasks, key=lambda task: (task[2], task[0])):
            if id not in self._names:
                number = sum(name.startswith(f"{slot}.") for name in self._names.values()) + 1
                self._names[id] = f"{slot}.{number}"
            present[self._names[id]] = (desired, state)
        for name in sorted(present.keys() | self._tasks.keys()):
            now = present.get(name, ("", "gone"))
            if now != self._tasks.get(name):
                self.trace.append(Seen(round(at_s, 2), now[1], name, now[0]))
        if update != self._update:
            message = update[1]
            for id, name in self._names.items():
                message = message.replace(id, name)
            self.trace.append(Seen(round(at_s, 2), update[0] or NO_UPDATE, message=message))
        self._tasks, self._update = present, update


def reported(trace: Iterable[Seen]) -> Observed:
    """What counts of ``trace``."""
    states: dict[str, list[str]] = {}
    running: set[str] = set()
    together: set[str] = set()
    updates: list[str] = []
    message = ""
    for seen in trace:
        if not seen.task:
            if seen.state != NO_UPDATE:
                updates.append(seen.state)
                message = seen.message
            continue
        states.setdefault(seen.task, []).append(seen.state)
        running.discard(seen.task)
        if seen.state == "running":
            running.add(seen.task)
            slot = _slot(seen.task)
            if sum(_slot(task) == slot for task in running) > 1:
                together.add(slot)
    slots: dict[str, list[str]] = {}
    for task in sorted(states, key=_order):
        if "running" in states[task]:
            slots.setdefault(_slot(task), []).append(states[task][-1])
    return Observed(
        {slot: tuple(ends) for slot, ends in sorted(slots.items())},
        tuple(sorted(together)),
        (*_distinct(updates), message),
    )


def _slot(task: str) -> str:
    return task.partition(".")[0]


def _order(task: str) -> tuple[int, int]:
    slot, _, number = task.partition(".")
    return int(slot), int(number)


def _distinct(words: Iterable[str]) -> Iterator[str]:
    before = ""
    for word in words:
        if word != before:
            yield word
        before = word
