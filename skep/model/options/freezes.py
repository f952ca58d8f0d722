"""Change freezes and maintenance windows: times in which Skep changes nothing by itself.  Pure.

A freeze holds for the cluster or for one stack, and has an end.  A window is a recurring time.  Outside of it, the
cluster or the stack is frozen as well.  ``docs/decisions/0189`` lists what waits and what does not.
"""

from collections.abc import Mapping
from typing import Final

from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.options.schedules import CRON, CRON_TIME_ZONE, Schedule, check_times, parsed_schedule
from skep.model.task_end import on_one_line
from skep.model.values.encoding import ApiObject, always
from skep.model.values.times import SECOND_NS, ZERO_TIME, Nanoseconds, Timestamp, timestamp, unix_ns

CLUSTER: Final = ""
"""Key of the cluster's freeze.  The other keys are stacks."""
FREEZE_S_MAX: Final = 90 * 24 * 3600.0
"""Longest freeze.  Nobody remembers a longer one, and it can be renewed."""
REASON_CHARACTERS_MAX: Final = 200
"""Longest reason, so that a refusal that quotes it fits a few lines."""
ADMIN_OVERRIDES = "Only administrators may override it"
"""End of the refusal of a user who overrides the cluster's freeze."""
STACKS_MAX: Final = 200
"""Largest number of frozen stacks, and of stacks with a window.  All of them are one value of the store, which is read
with each decision.
"""
LENGTH_S_MIN, LENGTH_S_MAX = 60.0, 7 * 24 * 3600.0
"""Shortest and longest opening of a window.  A minute is the unit of its times, and a week their longest usual
period."""
_OPENINGS_TRIED: Final = 1000
"""Openings of a window among which one must be followed by a closed time, or coincide with an opening of another
window.  A year of days has fewer."""


class ChangeFreeze(ApiObject):
    """A freeze of the cluster or of a stack.  ``is_strict``: it also refuses the users' deploys and drains."""

    since: Timestamp = always(ZERO_TIME)
    until: Timestamp = always(ZERO_TIME)
    by: str = always("")
    """The user who froze it, or empty if unknown."""
    reason: str = always("")
    is_strict: bool = always(False)

    def words(self, scope: str) -> str:
        """Return a sentence about the freeze of ``scope``, which is a stack or empty for the cluster."""
        subject = f"stack {scope}" if scope else "the cluster"
        by = f" by {self.by}" if self.by else ""
        reason = f": {self.reason}" if self.reason else ""
        return f"{subject} is frozen until {_clock(self.until)}{by}{reason}"


class MaintenanceWindow(ApiObject):
    """A recurring time in which Skep may act by itself, on the cluster or on one stack.

    ``cron`` has the times at which it opens, ``length`` how long it stays open.  The leader writes ``closed_until``,
    the next opening, which is empty while the window is open.
    """

    cron: str = always("")
    time_zone: str = always("UTC")
    length: Nanoseconds = always(0)
    closed_until: Timestamp = always(Timestamp(""))

    @property
    def times(self) -> str:
        """The times of the window, in words."""
        return f"{self.cron} ({self.time_zone}), for {self.length / SECOND_NS / 60:g} minutes"

    def words(self, scope: str = CLUSTER) -> str:
        """Return a sentence about the closed window of ``scope``, which is a stack or empty for the cluster."""
        subject = f"the maintenance window of stack {scope}" if scope else "the maintenance window"
        return f"{subject} is closed until {_clock(self.closed_until)}"


class FreezeRequest(ApiObject):
    """Body of a request for a freeze."""

    until: Timestamp = always(Timestamp(""))
    reason: str = always("")
    is_strict: bool = always(False)


class FreezesResponse(ApiObject):
    """The freezes and windows that a user may see.  The key of the cluster's freeze is empty.

    ``stack_windows`` has the windows of stacks by their stack.
    """

    freezes: Mapping[str, ChangeFreeze] = always({})
    window: MaintenanceWindow | None = None
    stack_windows: Mapping[str, MaintenanceWindow] = {}


def checked_freeze(wanted: FreezeRequest, by: str, now_ns: int) -> ChangeFreeze:
    """Return the requested freeze.  Raises: InvalidArgument: its end is missing, past, or too late."""
    if not wanted.until:
        raise InvalidArgument("a freeze needs an end: use --for DURATION or --until TIME")
    until_ns = unix_ns(wanted.until)
    if until_ns <= now_ns:
        raise InvalidArgument(f"the freeze would end in the past: {_clock(wanted.until)}")
    if until_ns - now_ns > FREEZE_S_MAX * SECOND_NS:
        raise InvalidArgument(
            f"a freeze lasts at most {FREEZE_S_MAX / 86400:g} days: choose an earlier end, and renew it later"
        )
    if (length := len(wanted.reason)) > REASON_CHARACTERS_MAX:
        raise InvalidArgument(
            f"the reason has {length} characters, {REASON_CHARACTERS_MAX} are possible: shorten it"
        )
    return ChangeFreeze(
        since=timestamp(now_ns),
        until=timestamp(until_ns),
        by=by,
        reason=on_one_line(wanted.reason),
        is_strict=wanted.is_strict,
    )


def checked_window(wanted: MaintenanceWindow, now_ns: int) -> MaintenanceWindow:
    """Return the requested window at this time.  Raises: InvalidArgument: it can never open, or never close."""
    if not LENGTH_S_MIN * SECOND_NS <= wanted.length <= LENGTH_S_MAX * SECOND_NS:
        raise InvalidArgument(
            f"a window stays open from {LENGTH_S_MIN:g} s to {LENGTH_S_MAX / 86400:g} days: set its length with --for"
        )
    try:
        schedule = _schedule(wanted)
        check_times(schedule)
    except InvalidArgument as error:
        words = (
            str(error).replace(f"label {CRON_TIME_ZONE}=", "time zone ").replace(f"label {CRON}=", "window ")
        )
        raise InvalidArgument(words.replace("it would never run", "it would never open")) from error
    if not _closes(schedule, wanted.length // SECOND_NS, now_ns // SECOND_NS):
        raise InvalidArgument(
            "the window would never close, because it opens again before it closes: shorten it"
        )
    return window_at(wanted, now_ns)


def window_at(window: MaintenanceWindow, now_ns: int) -> MaintenanceWindow:
    """Return ``window`` as it is at this time.  A window that cannot be read is open."""
    now_s, length_s = now_ns // SECOND_NS, window.length // SECOND_NS
    try:
        schedule = _schedule(window)
    except InvalidArgument:  # the time zone is unknown on this machine
        return replace(window, closed_until=Timestamp(""))
    is_open = schedule.last_until(now_s - length_s, now_s) is not None
    opens_s = None if is_open else schedule.next_after(now_s)
    return replace(
        window, closed_until=timestamp(opens_s * SECOND_NS) if opens_s is not None else Timestamp("")
    )


def never_meet(window: MaintenanceWindow, other: MaintenanceWindow, now_ns: int) -> bool:
    """Return whether two windows are never open at the same time.  A window that cannot be read meets every other."""
    try:
        schedules = _schedule(window), _schedule(other)
    except InvalidArgument:
        return False
    lengths = window.length // SECOND_NS, other.length // SECOND_NS
    opens = [
        one.next_after(now_ns // SECOND_NS - length) for one, length in zip(schedules, lengths, strict=True)
    ]
    for _ in range(_OPENINGS_TRIED):
        first, second = opens
        if first is None or second is None:
            return True
        if first < second + lengths[1] and second < first + lengths[0]:
            return False
        # The window that closes first skips the openings that end before the other one opens.
        early = 0 if first < second else 1
        opens[early] = schedules[early].next_after(max(first, second) - lengths[early])
    return True


def ended(freezes: Mapping[str, ChangeFreeze], now_ns: int) -> list[str]:
    """Return the keys of the freezes that are over."""
    return [scope for scope, freeze in freezes.items() if unix_ns(freeze.until) <= now_ns]


def _schedule(window: MaintenanceWindow) -> Schedule:
    return parsed_schedule({CRON: window.cron, CRON_TIME_ZONE: window.time_zone or "UTC"})


def _closes(schedule: Schedule, length_s: int, now_s: int) -> bool:
    """Return whether there is a time between two openings."""
    at = schedule.next_after(now_s)
    for _ in range(_OPENINGS_TRIED):
        if at is None:
            return True
        following = schedule.next_after(at)
        if following is None or following - at > length_s:
            return True
        at = following
    return False


def _clock(at: Timestamp) -> str:
    return f"{at[:10]} {at[11:16]} UTC"
