"""Schedules of jobs: labels with the times at which a job is to run again.  Pure.

An expression has cron's five fields, and means what Debian's cron makes of it, at changes of the clock too: a time of
day that does not exist is moved to the first one that does, one that exists twice runs once; where minute or hour
begins with ``*``, every time that exists counts.  All comparisons are between points in time, never between local
times.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, tzinfo
from enum import Enum
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim, CronSimError

from skep.errors import InvalidArgument
from skep.model.labels import JOB_TTL
from skep.model.times import SECOND_NS, duration_ns

CRON: Final = "skep.cron"
"""On jobs: when they run; the labels that begin with it say how."""
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
CHARACTERS_MAX: Final = 250
"""Of one expression."""
DEADLINE_S_MAX: Final = 365 * 24 * 3600.0
MAX_ATTEMPTS_DEFAULT: Final = 6
"""Kubernetes' ``backoffLimit``: without a limit a command that always fails holds up all later runs."""
MAX_ATTEMPTS_MAX: Final = 1000
"""So many tasks may stay in the history of each slot while the run goes on."""
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
"""Files beside the time zones, which differ between machines or mean nothing."""
_TRIED_FROM: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""Every calendar that there is follows within the fifty years that are searched."""
_FIRST_WINDOW_S: Final = 3600


class Concurrency(Enum):
    """What happens when a run is due and the one before it is still going."""

    FORBID = "forbid"
    """It is skipped."""
    REPLACE = "replace"
    """The one before is stopped."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """When a job runs.

    ``deadline_s``: how late a run may start; None: there is no limit.  ``max_attempts``: how often a failed task of a
    run is started again, if the restart policy sets no limit; 0: there is none.
    """

    expressions: tuple[str, ...]
    zone: tzinfo = UTC
    concurrency: Concurrency = Concurrency.FORBID
    deadline_s: float | None = None
    is_suspended: bool = False
    max_attempts: int = MAX_ATTEMPTS_DEFAULT

    def next_after(self, after_s: int) -> int | None:
        """The first due time after ``after_s``, both in seconds since the epoch; None: there is none.

        A suspended schedule has the times that it would have.
        """
        times = [next(self._times(expression, after_s), None) for expression in self.expressions]
        return min((at for at in times if at is not None), default=None)

    def last_until(self, after_s: int, until_s: int) -> int | None:
        """The last due time after ``after_s`` and not after ``until_s``; None: there is none.

        After years without a leader this still takes few steps: what is searched grows from the end.
        """
        window_s = _FIRST_WINDOW_S
        while True:
            start_s = max(after_s, until_s - window_s)
            found = [
                at
                for expression in self.expressions
                if (at := _last(self._times(expression, start_s), until_s)) is not None
            ]
            if found or start_s == after_s:
                return max(found, default=None)
            window_s *= 2

    def _times(self, expression: str, after_s: int) -> Iterator[int]:
        """The due times of one expression after ``after_s``, each once."""
        last_s = after_s
        for at in CronSim(expression, datetime.fromtimestamp(after_s, self.zone)):
            # Of two local times that mean the same moment, or of an hour that comes twice, cronsim may give one again.
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
    """The schedule in the labels of a job; None: it has none, or none that can be read."""
    if CRON not in labels:
        return None
    try:
        return parsed_schedule(labels)
    except InvalidArgument:
        return None


def max_attempts_of(labels: Mapping[str, str]) -> int:
    """Return how often a failed task of a job is started again if its restart policy sets no limit; 0: no limit.

    A job without a schedule has no limit, as in Docker.
    """
    if CRON not in labels:
        return 0
    schedule = schedule_of(labels)
    return schedule.max_attempts if schedule is not None else MAX_ATTEMPTS_DEFAULT


def same_schedule(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether the labels of a service before and after an update mean the same times."""
    return all(one.get(label) == other.get(label) for label in SCHEDULE_LABELS)


def check_schedule(labels: Mapping[str, str], mode: str) -> None:
    """Raises: InvalidArgument: a label of the schedule is invalid, or the service is no job."""
    given = [label for label in SCHEDULE_LABELS if label in labels]
    if not given:
        return
    if CRON not in labels:
        raise InvalidArgument(f"label {given[0]} needs label {CRON}, which says when the job runs")
    if mode not in JOB_MODES:
        raise InvalidArgument(
            f"label {CRON} is for jobs: want mode {' or '.join(JOB_MODES)}, the service is {mode}"
        )
    if JOB_TTL in labels:
        raise InvalidArgument(
            f"labels {CRON} and {JOB_TTL} cannot be used together: a job with a schedule is kept for its next run"
        )
    schedule = parsed_schedule(labels)
    for expression in schedule.expressions:
        if next(CronSim(expression, _TRIED_FROM), None) is None:
            raise _never(expression)


def parsed_schedule(labels: Mapping[str, str]) -> Schedule:
    """The schedule in ``labels``, which have ``skep.cron``.  Raises: InvalidArgument."""
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
    """``text`` with five fields.  Raises: InvalidArgument."""
    wanted = "want five fields (minute, hour, day of the month, month, day of the week) or " + ", ".join(
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
    """What cronsim says of an expression; None: nothing is wrong."""
    try:
        CronSim(text, _TRIED_FROM)
    except CronSimError as error:
        return str(error)
    except (AssertionError, TypeError, ValueError):  # such as 5L/2, a step that has no beginning
        return "invalid"
    return None


def _never(expression: str) -> InvalidArgument:
    return InvalidArgument(f"invalid label {CRON}={expression}: there is no such day, it would never run")


def _zone(name: str) -> tzinfo:
    """Raises: InvalidArgument."""
    if name == "UTC":
        return UTC  # cronsim is faster with it than with a zone that never changes
    is_zone = name not in _LOCAL_ZONES and not name.startswith(("posix/", "right/"))
    try:
        if is_zone:
            return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # no such file, a directory, no name of a file
        pass
    raise InvalidArgument(
        f"invalid label {CRON_TIME_ZONE}={name}: want a name of the IANA database that this manager has, such as "
        "Europe/Berlin"
    )


def _concurrency(word: str | None) -> Concurrency:
    try:
        return Concurrency(Concurrency.FORBID.value if word is None else word)
    except ValueError:
        wanted = " or ".join(each.value for each in Concurrency)
        raise InvalidArgument(f"invalid label {CRON_CONCURRENCY}={word}: want {wanted}") from None


def _deadline_s(text: str | None) -> float | None:
    if text is None:
        return None
    duration = duration_ns(text)
    if duration is None or not SECOND_NS <= duration <= DEADLINE_S_MAX * SECOND_NS:
        raise InvalidArgument(
            f"invalid label {CRON_DEADLINE}={text}: want a duration like 30s or 2h, from 1s to "
            f"{DEADLINE_S_MAX / 3600:g} h"
        )
    return duration / SECOND_NS


def _is_suspended(word: str | None) -> bool:
    if word is None or word.lower() in ("true", "false"):
        return (word or "").lower() == "true"
    raise InvalidArgument(f"invalid label {CRON_SUSPEND}={word}: want true or false")


def _max_attempts(text: str | None) -> int:
    if text is None:
        return MAX_ATTEMPTS_DEFAULT
    if text.isascii() and text.isdecimal() and len(text) <= 4 and int(text) <= MAX_ATTEMPTS_MAX:
        return int(text)
    raise InvalidArgument(
        f"invalid label {CRON_MAX_ATTEMPTS}={text}: want a number from 1 to {MAX_ATTEMPTS_MAX}, or 0 for no limit"
    )
