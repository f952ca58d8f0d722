"""Schedules of jobs: labels with the times of a job's runs.  Pure.

An expression has cron's five fields and the same meaning as in Debian's cron, even when daylight saving time begins or
ends.  A due time that the clock skips moves to the first time after the gap.  A due time that occurs twice runs once.
If minute or hour begins with ``*``, the job runs at every time that occurs.  The code compares points in time, never
local times.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, tzinfo
from enum import Enum
from functools import lru_cache
from typing import Final

import msgspec
from cronsim import CronSim, CronSimError

from skep.errors import InvalidArgument
from skep.model.options.labels import JOB_TTL, STOPPED
from skep.model.service import MAX_ATTEMPTS_MAX
from skep.model.values.times import SECOND_NS, duration_ns

CRON: Final = "skep.cron"
"""Label of a job with its due times.  Labels that begin with this name hold further settings."""
CRON_TIME_ZONE: Final = "skep.cron.time-zone"
CRON_CONCURRENCY: Final = "skep.cron.concurrency"
CRON_DEADLINE: Final = "skep.cron.deadline"
CRON_SUSPEND: Final = "skep.cron.suspend"
CRON_MAX_ATTEMPTS: Final = "skep.cron.max-attempts"
SCHEDULE_LABELS: Final = (
    CRON,
    CRON_TIME_ZONE,
    CRON_CONCURRENCY,
    CRON_DEADLINE,
    CRON_SUSPEND,
    CRON_MAX_ATTEMPTS,
)

JOB_MODES: Final = ("replicated-job", "global-job")
EXPRESSIONS_MAX: Final = 10
"""Largest number of cron expressions of one service."""
CHARACTERS_MAX: Final = 250
"""Longest expression, in characters."""
DEADLINE_S_MAX: Final = 365 * 24 * 3600.0
"""Longest deadline.  More than a year is a mistake."""
MAX_ATTEMPTS_DEFAULT: Final = 6
"""Kubernetes' default of ``backoffLimit``.  Without a limit, a command that always fails would delay all later runs."""
_FIELDS: Final = {
    "Bad minute": "minute (0 to 59)",
    "Bad hour": "hour (0 to 23)",
    "Bad day-of-month": "day of the month (1 to 31, L)",
    "Bad month": "month (1 to 12, JAN to DEC)",
    "Bad day-of-week": "day of the week (0 to 7, SUN to SAT)",
}
_MACROS: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_LOCAL_ZONES: Final = ("localtime", "posixrules", "Factory")
"""Files of the time zone folder that are refused as a zone, because they differ between machines or have no meaning."""
_TRIED_FROM: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""Start of the search for a due time.  Every possible date occurs in the fifty years that are searched."""
_FIRST_WINDOW_S: Final = 3600
"""First window, in seconds before a guess, in which the last due time is searched.  The window then grows."""


def stop_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """Return the labels of a stop, which belong to the service and not to one of its specs.

    A stop also suspends the schedule of a job.
    """
    names = (STOPPED, CRON_SUSPEND) if STOPPED in labels and CRON in labels else (STOPPED,)
    return {name: labels[name] for name in names if name in labels}


def without_stop(labels: Mapping[str, str]) -> Mapping[str, str]:
    """Return the labels of a spec without the labels of a stop."""
    stop = stop_labels(labels)
    return {name: text for name, text in labels.items() if name not in stop}


class Concurrency(Enum):
    """Action if a run is due before the previous run has ended."""

    FORBID = "forbid"
    """Skip the due run."""
    REPLACE = "replace"
    """Stop the previous run."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """The schedule of a job.

    ``deadline_s``: seconds by which a run may start late, or None for no limit.  ``max_attempts``: restarts of a failed
    task in a run, if the restart policy sets no limit, or 0 for no limit.
    """

    expressions: tuple[str, ...]
    zone: tzinfo = UTC
    concurrency: Concurrency = Concurrency.FORBID
    deadline_s: float | None = None
    is_suspended: bool = False
    max_attempts: int = MAX_ATTEMPTS_DEFAULT

    def next_after(self, after_s: int) -> int | None:
        """Return the first due time after ``after_s``, both in seconds since the epoch, or None.

        A suspended schedule has due times as if it were not suspended.
        """
        times = [next(self._times(expression, after_s), None) for expression in self.expressions]
        return min((at for at in times if at is not None), default=None)

    def last_until(self, after_s: int, until_s: int) -> int | None:
        """Return the last due time after ``after_s`` and not after ``until_s``, or None.

        It takes few steps even after years without a leader, and for expressions with millions of due times.
        """
        found = [self._last(expression, after_s, until_s) for expression in self.expressions]
        return max((at for at in found if at is not None), default=None)

    def _last(self, expression: str, after_s: int, until_s: int) -> int | None:
        """Return the last due time of one expression.

        Cronsim's search backward only guesses: near changes of the clock it may differ by hours from the search
        forward, which decides.
        """
        end = datetime.fromtimestamp(until_s + 1, self.zone)
        guess = next(CronSim(expression, end, reverse=True), None)
        guess_s = round(guess.timestamp()) if guess is not None else after_s
        start_s, window_s = max(after_s, min(guess_s, until_s) - 1), _FIRST_WINDOW_S
        while True:
            found = _last(self._times(expression, start_s), until_s)
            if found is not None or start_s == after_s:
                return found
            start_s = max(after_s, start_s - window_s)
            window_s *= 2

    def _times(self, expression: str, after_s: int) -> Iterator[int]:
        """Yield the due times of one expression after ``after_s``, each once."""
        last_s = after_s
        for at in CronSim(expression, datetime.fromtimestamp(after_s, self.zone)):
            # Cronsim may yield a time twice if two local times are the same moment, or if an hour occurs twice.
            if (at_s := round(at.timestamp())) > last_s:
                last_s = at_s
                yield at_s


def _last(times: Iterator[int], until_s: int) -> int | None:
    found = None
    for at in times:
        if at > until_s:
            break
        found = at
    return found


def schedule_of(labels: Mapping[str, str]) -> Schedule | None:
    """Return the schedule in a job's labels, or None without a valid one."""
    if CRON not in labels:
        return None
    try:
        return parsed_schedule(labels)
    except InvalidArgument:
        return None


def max_attempts_of(labels: Mapping[str, str]) -> int:
    """Return how often a job's failed task is restarted if its restart policy sets no limit, or 0 for no limit.

    A job without a schedule has no limit, as in Docker.
    """
    if CRON not in labels:
        return 0
    schedule = schedule_of(labels)
    return schedule.max_attempts if schedule is not None else MAX_ATTEMPTS_DEFAULT


def same_schedule(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether the labels of a service before and after an update have the same schedule."""
    return all(one.get(label) == other.get(label) for label in SCHEDULE_LABELS)


def check_schedule(labels: Mapping[str, str], mode: str) -> None:
    """Check the schedule labels of a service.

    Raises: InvalidArgument: a label is invalid, or the service is not a job.
    """
    given = [label for label in SCHEDULE_LABELS if label in labels]
    if not given:
        return
    if CRON not in labels:
        raise InvalidArgument(f"label {given[0]} needs label {CRON}, which says when the job runs")
    if mode not in JOB_MODES:
        raise InvalidArgument(
            f"label {CRON} is for jobs: expected mode {' or '.join(JOB_MODES)}, the service is {mode}"
        )
    if JOB_TTL in labels:
        raise InvalidArgument(
            f"labels {CRON} and {JOB_TTL} cannot be used together: a job with a schedule is kept for its next run"
        )
    check_times(parsed_schedule(labels))


def check_times(schedule: Schedule) -> None:
    """Check that each expression has a due time.  Raises: InvalidArgument."""
    for expression in schedule.expressions:
        if next(CronSim(expression, _TRIED_FROM), None) is None:
            raise _never(expression)


def parsed_schedule(labels: Mapping[str, str]) -> Schedule:
    """Return the schedule in ``labels``, which have ``skep.cron``.  Raises: InvalidArgument."""
    return _parsed(*(labels.get(label) for label in SCHEDULE_LABELS))


@lru_cache(maxsize=4096)
def _parsed(
    cron: str | None,
    time_zone: str | None,
    concurrency: str | None,
    deadline: str | None,
    suspend: str | None,
    max_attempts: str | None,
) -> Schedule:
    texts = [text.strip() for text in (cron or "").split(";")]
    if len(texts) > EXPRESSIONS_MAX:
        raise InvalidArgument(
            f"invalid label {CRON}: it has {len(texts)} expressions, {EXPRESSIONS_MAX} are possible"
        )
    return Schedule(
        expressions=tuple(_expression(text) for text in texts),
        zone=_zone("UTC" if time_zone is None else time_zone),
        concurrency=_concurrency(concurrency),
        deadline_s=_deadline_s(deadline),
        is_suspended=_is_suspended(suspend),
        max_attempts=_max_attempts(max_attempts),
    )


def _expression(text: str) -> str:
    """Return the expression ``text`` with five fields, macros replaced.  Raises: InvalidArgument."""
    wanted = "expected five fields (minute, hour, day of the month, month, day of the week) or " + ", ".join(
        _MACROS
    )
    if text.startswith("@"):
        if text.lower() not in _MACROS:
            raise InvalidArgument(f"invalid label {CRON}={text}: {wanted}")
        return _MACROS[text.lower()]
    if not text.isascii() or len(text) > CHARACTERS_MAX or len(text.split()) != 5:
        raise InvalidArgument(f"invalid label {CRON}={text[:CHARACTERS_MAX]}: {wanted}")
    if (error := _error(text)) is None:
        return text
    minute, hour, day, _, weekday = text.split()
    if error == "Bad day-of-month" and _error(f"{minute} {hour} {day} * {weekday}") is None:
        raise _never(text)
    raise InvalidArgument(f"invalid label {CRON}={text}: its {_FIELDS.get(error, 'form')} is invalid")


def _error(text: str) -> str | None:
    """Return cronsim's error about an expression, or None if it is valid."""
    try:
        CronSim(text, _TRIED_FROM)
    except CronSimError as error:
        return str(error)
    except (AssertionError, TypeError, ValueError):  # such as 5L/2, a step without a start
        return "invalid"
    return None


def _never(expression: str) -> InvalidArgument:
    return InvalidArgument(f"invalid label {CRON}={expression}: there is no such day, it would never run")


def _zone(name: str) -> tzinfo:
    """Return the time zone ``name``.  Raises: InvalidArgument."""
    if name == "UTC":
        return UTC  # cronsim is faster with this constant than with a ZoneInfo
    is_zone = name not in _LOCAL_ZONES and not name.startswith(("posix/", "right/"))
    try:
        if is_zone:
            from zoneinfo import ZoneInfo  # few clusters have one, and it imports 0.2 MB

            return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # no such file, a directory, no name of a file
        pass
    raise InvalidArgument(
        f"invalid label {CRON_TIME_ZONE}={name}: expected a name of the IANA database that this manager has, such as "
        "Europe/Berlin"
    )


def _concurrency(word: str | None) -> Concurrency:
    try:
        return Concurrency(Concurrency.FORBID.value if word is None else word)
    except ValueError:
        wanted = " or ".join(each.value for each in Concurrency)
        raise InvalidArgument(f"invalid label {CRON_CONCURRENCY}={word}: expected {wanted}") from None


def _deadline_s(text: str | None) -> float | None:
    if text is None:
        return None
    duration = duration_ns(text)
    if duration is None or not SECOND_NS <= duration <= DEADLINE_S_MAX * SECOND_NS:
        raise InvalidArgument(
            f"invalid label {CRON_DEADLINE}={text}: expected a duration like 30s or 2h, from 1s to "
            f"{DEADLINE_S_MAX / 3600:g} h"
        )
    return duration / SECOND_NS


def _is_suspended(word: str | None) -> bool:
    if word is None or word.lower() in ("true", "false"):
        return (word or "").lower() == "true"
    raise InvalidArgument(f"invalid label {CRON_SUSPEND}={word}: expected true or false")


def _max_attempts(text: str | None) -> int:
    if text is None:
        return MAX_ATTEMPTS_DEFAULT
    if text.isascii() and text.isdecimal() and len(text) <= 4 and int(text) <= MAX_ATTEMPTS_MAX:
        return int(text)
    raise InvalidArgument(
        f"invalid label {CRON_MAX_ATTEMPTS}={text}: expected a number from 1 to {MAX_ATTEMPTS_MAX}, or 0 for no limit"
    )
