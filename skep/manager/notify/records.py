"""Records of notifications in the store: targets, open incidents, and deliveries to each target.

Each record is a payload, so no API shows it, and managers of older versions ignore it.  Targets are written by the API,
the other records by the leader.  All of them are bounded.
"""

from typing import Final

import msgspec

from skep.manager.notify.problems import LastBackup, Problem
from skep.model.options.notifications import Topic
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, id_of_name, read_record, write_record

TARGETS_ID: Final = "notify/targets"
INCIDENTS_ID: Final = "notify/incidents"
BACKUP_ID: Final = "notify/backup"
TARGETS_MAX = 16
"""Largest number of targets.  Each one is a message for every problem."""
OPEN_MAX = 200
"""Largest number of open incidents.  If a whole cluster fails, further ones would tell nobody more."""
WAITING_MAX = 100
"""Largest number of notices that wait for one target.  The oldest are dropped, and the next message says how many."""
MESSAGE_NOTICES_MAX = 20
"""Largest number of notices in one message.  Chat services cut longer messages."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A target with its credentials.  ``id`` differs if a removed target is added again under the same name."""

    id: str
    name: str
    url: str
    secret: str = ""
    topics: tuple[Topic, ...] = ()
    stacks: tuple[str, ...] = ()
    allows_internal: bool = False
    created_ns: int = 0

    def __repr__(self) -> str:
        return f"Target(name={self.name!r})"

    def wants(self, problem: "Problem | Incident") -> bool:
        """Return whether the target is notified about a problem."""
        if self.topics and problem.topic not in self.topics:
            return False
        return not self.stacks or problem.stack in self.stacks


class Targets(msgspec.Struct, frozen=True):
    """All targets, in the order in which they were added."""

    targets: tuple[Target, ...] = ()


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """A problem from its begin to its end.  ``reminded_ns`` is the time of its last notice except the end."""

    id: str
    key: str
    topic: Topic
    message: str
    began_ns: int
    reminded_ns: int
    subject: str = ""
    stack: str = ""
    is_over: bool = False


class Incidents(msgspec.Struct, frozen=True):
    """Open incidents by the key of their problem."""

    open: dict[str, Incident] = {}


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a message: ``status`` is ``began``, ``reminder`` or ``ended``."""

    status: str
    incident: Incident
    at_ns: int


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """Messages to one target: sent, being sent, and waiting.

    Attributes:
        sending: Notices of message ``number``, from before the first attempt until it is delivered or given up.  So a
            repeated attempt, also of the next leader, sends the same message under the same id.
        failing_since_ns: Time of the first failure since the last success, or 0.
        free_at_ns: Time at which the target's rate is used up to, as in the generic cell rate algorithm.
    """

    target_id: str
    waiting: tuple[Notice, ...] = ()
    sending: tuple[Notice, ...] = ()
    number: int = 0
    missed: int = 0
    """Notices that were dropped since message ``number`` was recorded."""
    told_missed: int = 0
    """Notices that were dropped before, which message ``number`` tells."""
    attempts: int = 0
    retry_at_ns: int = 0
    failing_since_ns: int = 0
    error: str = ""
    sent: int = 0
    failed: int = 0
    dropped: int = 0
    sent_ns: int = 0
    free_at_ns: int = 0

    @property
    def outstanding(self) -> int:
        """Number of notices that are not delivered yet."""
        return len(self.sending) + len(self.waiting)


def delivery_id(name: str) -> str:
    """Return the id of the payload with the deliveries to a target."""
    return f"notify/queue/{id_of_name(name)}"


def targets_in(view: View) -> tuple[Target, ...]:
    """Return all targets, or none if they cannot be read."""
    return read_record(view.lookup(Payload, TARGETS_ID), Targets()).targets


def incidents_in(view: View) -> dict[str, Incident]:
    """Return the open incidents by key."""
    return read_record(view.lookup(Payload, INCIDENTS_ID), Incidents()).open


def delivery_in(view: View, target: Target) -> Delivery | None:
    """Return the deliveries to a target, or None if nothing was recorded about it."""
    found = read_record(view.lookup(Payload, delivery_id(target.name)), Delivery(target_id=""))
    return found if found.target_id == target.id else None


def backup_in(view: View) -> LastBackup:
    """Return the last backup."""
    return read_record(view.lookup(Payload, BACKUP_ID), LastBackup())


def note_backup(tx: Transaction, error: str, now_ns: int) -> None:
    """Record that a backup is complete, or failed with ``error``.  Clocks of managers differ, so the order decides."""
    complete_ns = backup_in(tx).complete_ns
    failed = LastBackup(complete_ns, max(now_ns, complete_ns + 1), error)
    write_record(tx, BACKUP_ID, failed if error else LastBackup(now_ns))


def expects_backups_since_ns(targets: tuple[Target, ...]) -> int:
    """Return the time at which the first target was added.  Earlier backups were not recorded."""
    return min((one.created_ns for one in targets), default=0)
