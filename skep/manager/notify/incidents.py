"""Incidents: when they begin and end, and which notices their targets get.  Pure.

A problem begins an incident once it has lasted ``SETTLE_S``, and ends it once it has been absent for ``RESOLVE_S``.  So
a problem that returns soon is the same incident.  The store keeps open incidents, and one transaction changes an
incident and queues its notices.  So a new leader neither repeats nor loses a notice.
"""

from collections.abc import Iterable, Mapping

import msgspec
from msgspec.structs import replace

from skep.manager.notify.problems import Problem
from skep.manager.notify.records import OPEN_MAX, WAITING_MAX, Delivery, Incident, Notice, Target
from skep.model.values.times import SECOND_NS

SETTLE_S = 10.0
"""Seconds for which a problem must last.  Restarts of a daemon, and tasks that are replaced at once, are shorter."""
RESOLVE_S = 30.0
"""Seconds for which a problem must be absent.  A crash loop is shorter than that between two failures."""
REMIND_NS = 24 * 3600 * SECOND_NS
"""Nanoseconds between two reminders of an incident.  Whoever is on duty today sees yesterday's problems."""


class IncidentChanges(msgspec.Struct, frozen=True, kw_only=True):
    """Problems that begin an incident or need a reminder, and keys of incidents that end."""

    began: tuple[Problem, ...] = ()
    ended: tuple[str, ...] = ()
    reminded: tuple[Problem, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.began or self.ended or self.reminded)


class ProblemTimes:
    """Times since when this leader has seen problems without an incident, and incidents without their problem."""

    def __init__(self) -> None:
        self._present_since: dict[str, float] = {}
        self._absent_since: dict[str, float] = {}

    def due(
        self,
        problems: Mapping[str, Problem],
        incidents: Mapping[str, Incident],
        unknown: Iterable[str],
        *,
        now: float,
        now_ns: int,
    ) -> tuple[IncidentChanges, float]:
        """Return the due changes, and the monotonic time of the next one, or infinity.

        Args:
            unknown: Keys of incidents whose object was not read yet.  They do not end.
        """
        kept = set(unknown)
        present = {key: self._present_since.get(key, now) for key in problems if key not in incidents}
        absent = {
            key: self._absent_since.get(key, now)
            for key in incidents
            if key not in problems and key not in kept
        }
        self._present_since, self._absent_since = present, absent
        free = OPEN_MAX - len(incidents)
        began = [key for key, since in present.items() if since + SETTLE_S <= now][:free]
        ended = [key for key, since in absent.items() if since + RESOLVE_S <= now]
        reminded = [
            problem
            for key, one in incidents.items()
            if (problem := problems.get(key)) is not None
            and not problem.is_over
            and one.reminded_ns + REMIND_NS <= now_ns
        ]
        later = [since + SETTLE_S for since in present.values() if since + SETTLE_S > now]
        later += [since + RESOLVE_S for since in absent.values() if since + RESOLVE_S > now]
        changes = IncidentChanges(
            began=tuple(problems[key] for key in began), ended=tuple(ended), reminded=tuple(reminded)
        )
        return changes, min(later, default=float("inf"))


def changed(
    incidents: Mapping[str, Incident],
    deliveries: Mapping[str, Delivery | None],
    targets: Iterable[Target],
    changes: IncidentChanges,
    now_ns: int,
) -> tuple[dict[str, Incident], dict[str, Delivery]]:
    """Return the open incidents and the deliveries by target after ``changes``.

    A new target is told about the incidents that are open already.
    """
    after = {key: one for key, one in incidents.items() if key not in changes.ended}
    over = [incidents[key] for key in changes.ended if key in incidents]
    notices = [Notice(status="ended", incident=one, at_ns=now_ns) for one in over]
    for problem in changes.reminded:
        if (opened := after.get(problem.key)) is not None:
            reminded = replace(opened, message=problem.message, reminded_ns=now_ns)
            after[problem.key] = reminded
            notices.append(Notice(status="reminder", incident=reminded, at_ns=now_ns))
    for problem in changes.began:
        if problem.key not in after:
            after[problem.key] = incident = _incident(problem, now_ns)
            notices.append(Notice(status="began", incident=incident, at_ns=now_ns))
    already = [Notice(status="began", incident=one, at_ns=now_ns) for one in after.values()]
    told = {}
    for target in targets:
        known = deliveries.get(target.name)
        delivery, fresh = (known, notices) if known is not None else (Delivery(target_id=target.id), already)
        told[target.name] = with_notices(delivery, [one for one in fresh if target.wants(one.incident)])
    return after, told


def _incident(problem: Problem, now_ns: int) -> Incident:
    return Incident(
        id=f"{problem.key}@{now_ns // SECOND_NS}",
        key=problem.key,
        topic=problem.topic,
        message=problem.message,
        began_ns=now_ns,
        reminded_ns=now_ns,
        subject=problem.subject,
        stack=problem.stack,
        is_over=problem.is_over,
    )


def with_notices(delivery: Delivery, notices: Iterable[Notice]) -> Delivery:
    """Return ``delivery`` with further notices.  The oldest ones are dropped if there are too many."""
    waiting = (*delivery.waiting, *notices)
    surplus = max(len(waiting) - WAITING_MAX, 0)
    return replace(
        delivery,
        waiting=waiting[surplus:],
        missed=delivery.missed + surplus,
        dropped=delivery.dropped + surplus,
    )
