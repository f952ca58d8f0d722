"""Waits until services run with their spec, shows their progress, and stops when waiting cannot help."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

import msgspec
from msgspec.structs import replace

from skep.api.client.requests import Requests
from skep.api.client.waiting import persistently
from skep.errors import SkepError, Unavailable
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.unknown import leniently
from skep.stack.progress import (
    FAILURES_MAX,
    STEADY_S,
    UNPLACED,
    UP_TO_DATE,
    Explanation,
    ServiceProgress,
    explained,
    explanation_of,
    failed_by_slot,
    is_rolled_back_by_hand,
    progress_after_deploy,
    progress_of,
    running_by_slot,
)

_MANAGERS: Final = "managers"
"""Name under which progress says that no manager responds."""
_LOOK_S = 0.5
"""Seconds between polls of the services."""
_RESPONSE_TIMEOUT_S: Final = 15.0
"""Timeout of one poll in seconds."""
_EXPLAINED_MAX: Final = 5
"""Largest number of services that one poll asks the managers to explain.  If a service waits for a node, a manager has
to count all tasks of the cluster.
"""
_OTHERS_MAX: Final = 5
"""Largest number of other services that an error names with their causes, so that it fits on a screen."""
_EXPLAINED_AFTER_S: Final = 1.0
"""Seconds after which services without a failure are explained as well.  Most services run by then."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """A service's progress as its tasks show it at one poll.

    ``current``: ids of the tasks with the service's present spec.  ``failed`` and ``running``: slots of these tasks by
    task id, as far as the tasks have failed or are running.
    """

    id: str
    progress: ServiceProgress
    current: frozenset[str] = frozenset()
    failed: Mapping[str, Hashable] = {}
    running: Mapping[str, Hashable] = {}

    @classmethod
    def of(cls, id: str, progress: ServiceProgress, tasks: Sequence[Task], current: frozenset[str]) -> "Look":
        """Return the look at a service with ``tasks``.  ``current``: ids of the tasks with its present spec."""
        return cls(
            id=id,
            progress=progress,
            current=current,
            failed=failed_by_slot(tasks, current),
            running=running_by_slot(tasks, current),
        )


async def look_at(client: Requests, word: str, *, is_deployed: bool = False) -> Look:
    """Return the progress of the service with the name or id ``word``, as its tasks show it.

    Args:
        is_deployed: whether a deploy wants the present spec, even if an automatic rollback has led to it.  Of a
            scheduled job, it then awaits no run.

    Raises: SkepError.
    """
    found = await client.get(f"/services/{word}", timeout_s=_RESPONSE_TIMEOUT_S)
    filters = {"service": [found["ID"]]}
    tasks = await client.get("/tasks", filters=filters, timeout_s=_RESPONSE_TIMEOUT_S)
    present = await client.get("/tasks", filters={**filters, **UP_TO_DATE}, timeout_s=_RESPONSE_TIMEOUT_S)
    current = frozenset(str(one["ID"]) for one in present)
    shown = [leniently(msgspec.json.encode(task), Task) for task in tasks]
    service = leniently(msgspec.json.encode(found), Service)
    if is_deployed:
        progress = progress_after_deploy(service, shown, current, is_kept=True)
    else:
        progress = progress_of(service, shown, current, is_kept=is_rolled_back_by_hand(service))
    return Look.of(found["ID"], progress, shown, current)


class HeldTimes:
    """Tracks for how long facts have held at every look.  Pure.  Times are arguments, in seconds on one clock."""

    def __init__(self) -> None:
        self._since: dict[Hashable, float] = {}

    def held_s(self, fact: Hashable, now: float, *, holds: bool) -> float:
        """Return the seconds for which ``fact`` has held at every look, or 0 if it does not hold at ``now``."""
        if holds:
            return now - self._since.setdefault(fact, now)
        self._since.pop(fact, None)
        return 0.0


class Reasons:
    """Reads from the managers why the services of a wait do not run."""

    def __init__(self, client: Requests, failures_max: int) -> None:
        """``failures_max``: consecutive failures of a task that end the wait, or 0 to wait in spite of failures."""
        self._client = client
        self._failures_max = failures_max
        self._times = HeldTimes()
        """Times for which the problems of services have lasted and tasks have run, on the event loop's clock."""
        self._failed: dict[str, dict[str, Hashable]] = {}
        """Slots of failed tasks, by service and task id.  None replaces a slot that has run again since."""
        self._counts: dict[str, set[str]] = {}
        """Texts of the counts of tasks so far, by service.  A new count means progress."""
        self._last: dict[str, str] = {}
        """The managers' last reasons, by service."""
        self._began: float | None = None

    async def explain(self, looks: Mapping[str, Look]) -> dict[str, ServiceProgress]:
        """Return the progress of each service, with the reason for each service that is not done."""
        now = asyncio.get_running_loop().time()
        self._began = now if self._began is None else self._began
        is_late = now - self._began >= _EXPLAINED_AFTER_S
        open_ = [name for name, one in looks.items() if _is_open(one.progress)]
        unknown = [name for name in open_ if not looks[name].progress.is_explained]
        asked = [name for name in unknown if looks[name].progress.cause]
        if is_late:
            asked += [name for name in unknown if name not in asked]
        asked = asked[:_EXPLAINED_MAX]
        found = await asyncio.gather(*(self._explanation(looks[name].id) for name in asked))
        explanations = dict(zip(asked, found, strict=True))
        made = {name: one.progress for name, one in looks.items()}
        seen = {name: self._seen(name, one, now) for name, one in looks.items()}
        for name in open_:
            has_progress = self._has_progress(name, looks[name].progress.count)
            explanation = self._lasting(name, explanations.get(name, Explanation()), looks[name].progress)
            problem = explanation.problem or looks[name].progress.problem
            made[name] = explained(
                made[name],
                explanation,
                current=looks[name].current,
                failures_max=self._failures_max,
                unplaced_s=max(
                    self._times.held_s((name, kind), now, holds=problem.kind == kind and not has_progress)
                    for kind in UNPLACED
                ),
                given_up_s=self._times.held_s((name, "given up"), now, holds=problem.is_given_up),
                seen=seen[name],
            )
        return made

    def _lasting(self, name: str, found: Explanation, progress: ServiceProgress) -> Explanation:
        """Return the explanation, with the last known reason if the managers have none.

        The next attempt may run by the time at which they are asked, although this look has seen a failed task.
        """
        if found.reason or not progress.cause:
            self._last[name] = found.reason
            return found
        return replace(found, reason=self._last.get(name, ""))

    def _has_progress(self, name: str, count: str) -> bool:
        """Return whether the service has this count of running tasks for the first time.

        If nodes join one after another, some task waits for minutes while others start, which must not end the wait.
        """
        seen = self._counts.setdefault(name, set())
        is_new = count not in seen
        seen.add(count)
        return is_new

    def _seen(self, name: str, look: Look, now: float) -> int:
        """Count the worst slot's failures since the wait began, or since one of its tasks ran for ``STEADY_S``.

        A task that runs at the first look has left the failures before it behind.
        """
        is_first = name not in self._failed
        failed = self._failed.setdefault(name, {})
        failed |= {id: slot for id, slot in look.failed.items() if id not in failed}
        for task, running in look.running.items():
            if self._times.held_s((name, task), now, holds=True) >= STEADY_S or is_first:
                failed |= {id: None for id, slot in failed.items() if slot == running}
        return max(Counter(slot for slot in failed.values() if slot is not None).values(), default=0)

    async def _explanation(self, id: str) -> Explanation:
        try:
            return explanation_of(
                await self._client.get(f"/skep/services/{id}/explain", timeout_s=_RESPONSE_TIMEOUT_S)
            )
        except SkepError:  # the managers have an earlier version, or the service was just removed
            return Explanation()


def _is_open(progress: ServiceProgress) -> bool:
    """Return whether there is more to say.  A stuck update has the managers' message, other stuck services a cause."""
    return not progress.is_done and bool(not progress.is_stuck or progress.cause)


class Steadiness:
    """Tracks since when the services of a wait run, and which of them have failed since it began."""

    def __init__(self) -> None:
        self._failed: set[str] = set()
        self._since: dict[str, tuple[str, float]] = {}
        """Start of the youngest task, and the time of the first look at it, by service."""

    def is_steady(self, name: str, found: ServiceProgress, now: float) -> bool:
        """Return whether a service that is done at ``now`` needs no further look.  ``now``: seconds of one clock."""
        if not found.is_done:
            self._since.pop(name, None)
            if found.problem.failures:
                self._failed.add(name)
            return False
        started_at, since = self._since.get(name, ("", now))
        if started_at != found.started_at:
            since = now
        self._since[name] = found.started_at, since
        return found.is_final or now - since >= max(
            found.steady_s, STEADY_S if self.has_failed(name) else 0.0
        )

    def has_failed(self, name: str) -> bool:
        """Return whether the service has failed since the wait began."""
        return name in self._failed


async def wait_done(
    names: Iterable[str],
    look: Callable[[set[str]], Awaitable[Mapping[str, ServiceProgress]]],
    show: Callable[[str, str], None],
) -> None:
    """Look at the services ``names`` until all are done, and pass each service's progress to ``show``.

    A service has to run for its monitor time, because its tasks may end a moment after their start.

    Raises: Unavailable: a service is stuck, or waiting cannot help.  Errors of the first ``look`` are raised too.
    """
    waiting, steadiness = set(names), Steadiness()
    looked = await look(waiting) if waiting else {}
    while waiting:
        now = asyncio.get_running_loop().time()
        for name, found in looked.items():
            if name not in waiting:
                continue
            if found.is_stuck:
                raise Unavailable(_stuck(name, looked, waiting))
            is_steady = steadiness.is_steady(name, found, now)
            text = found.text
            if found.is_done and not is_steady:
                again = " again after a failure" if steadiness.has_failed(name) else ""
                text = f"{text}{again}, verifying that they keep running"
            show(name, text)
            if is_steady:
                waiting.discard(name)
        if waiting:
            await asyncio.sleep(_LOOK_S)
            looked = await persistently(partial(look, waiting), partial(show, _MANAGERS))


async def wait_for(
    client: Requests,
    names: Sequence[str],
    show: Callable[[str, str], None],
    wait_s: float,
    failures_max: int = FAILURES_MAX,
    *,
    is_deployed: bool = False,
) -> None:
    """Wait until services are in their desired state, and pass the progress of each to ``show``.

    ``is_deployed``: see ``look_at``.

    Raises: Unavailable: they are not within ``wait_s``, or waiting cannot help.
    """
    reasons, open_, shown = Reasons(client, failures_max), set(names), dict[str, str]()

    async def look(waiting: set[str]) -> dict[str, ServiceProgress]:
        nonlocal open_
        looks = {
            name: await look_at(client, name, is_deployed=is_deployed)
            for name in sorted(waiting, key=names.index)
        }
        found = await reasons.explain(looks)
        shown.pop(_MANAGERS, None)
        # A service that ran at an earlier look may have failed since.
        open_ = {name for name, progress in found.items() if not progress.is_done}
        return found

    def noted(name: str, text: str) -> None:
        shown[name] = text
        show(name, text)

    try:
        async with asyncio.timeout(wait_s):
            await wait_done(names, look, noted)
    except TimeoutError:
        if _MANAGERS in shown:
            why = shown[_MANAGERS].rstrip(".")
            raise Unavailable(f"not done within {wait_s:g} s: {why}. Run skep status.") from None
        texts = {name: shown.get(name, "no manager has responded") for name in sorted(open_)}
        raise Unavailable(unfinished(texts, wait_s)) from None


def _stuck(name: str, looked: Mapping[str, ServiceProgress], waiting: Collection[str]) -> str:
    """Return the error of a wait that ends because the service ``name`` is stuck.  The error also names the causes of
    other unfinished services, so that one deploy shows all of them.
    """
    first = f"{name}: {looked[name].text}."
    others = [
        f"{other}: {found.text}"
        for other, found in looked.items()
        if other != name and other in waiting and not found.is_done and found.cause
    ]
    more = f"; and {len(others) - _OTHERS_MAX} more" if len(others) > _OTHERS_MAX else ""
    also = f" Also not done: {'; '.join(others[:_OTHERS_MAX])}{more}." if others else ""
    return f"{first}{also} Run skep explain {name}."


def unfinished(texts: Mapping[str, str], wait_s: float) -> str:
    """Return the error of a wait that took too long.  ``texts``: progress of the unfinished services, by name."""
    if not texts:
        return f"not done within {wait_s:g} s: all tasks run, but not long enough to verify that they keep running"
    named = "; ".join(f"{name}: {text}" for name, text in texts.items())
    return f"not done within {wait_s:g} s: {named}. Run skep explain {next(iter(texts))}."
