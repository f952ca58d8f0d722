"""The forms of a message: JSON for webhooks, lines of text for chat and mail.  Pure.

A message has only what ``skep status`` shows too: names, states and reasons, with credentials masked.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import msgspec

from skep.manager.notify.records import Delivery, Notice
from skep.model.values.counts import counted
from skep.model.values.times import SECOND_NS, timestamp

_WORDS = {"began": "Problem", "reminder": "Still a problem", "ended": "Resolved"}


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message.  ``id`` stays the same if it is sent again.

    Attributes:
        missed: Number of earlier notices that were dropped.
    """

    id: str
    cluster: str
    cluster_id: str
    at_ns: int
    notices: tuple[Notice, ...] = ()
    missed: int = 0
    is_test: bool = False

    @property
    def subject(self) -> str:
        """Return one line: the notice itself, or the number of notices."""
        if self.is_test:
            words = "Test message"
        elif len(self.notices) == 1:
            words = _line(self.notices[0])
        else:
            words = ", ".join(_counts(self.notices))
        return f"[{self.cluster}] {words}"

    @property
    def text(self) -> str:
        """Return the message as lines of text, without an end of line."""
        return "\n".join((self.subject, *self._further_lines()))

    def _further_lines(self) -> Iterator[str]:
        if self.is_test:
            yield "Notifications of this cluster reach you. Nothing is wrong."
        if len(self.notices) > 1:
            yield from map(_line, self.notices)
        if self.missed:
            yield f"{counted(self.missed, 'earlier notice')} could not be delivered: see skep history"

    @property
    def body(self) -> Mapping[str, Any]:
        """Return the message as JSON, for webhooks."""
        return {
            "ID": self.id,
            "Cluster": {"ID": self.cluster_id, "Name": self.cluster},
            "Time": timestamp(self.at_ns),
            "Test": self.is_test,
            "Text": self.text,
            "Dropped": self.missed,
            "Notices": [
                {
                    "Status": one.status,
                    "Incident": one.incident.id,
                    "Topic": one.incident.topic.value,
                    "Subject": one.incident.subject,
                    "Stack": one.incident.stack,
                    "Message": one.incident.message,
                    "BeganAt": timestamp(one.incident.began_ns),
                    "At": timestamp(one.at_ns),
                }
                for one in self.notices
            ],
        }


def message_of(delivery: Delivery, cluster: str, cluster_id: str) -> Message:
    """Return the message that is being sent.  It is the same at every attempt.

    Its id has a time and a digest of its notices.  After a restore of an older state, numbers repeat, and a notice may
    be sent together with others than before.  Receivers drop known ids, so they would not get those.
    """
    notices = [f"{one.status} {one.incident.id} {one.at_ns}" for one in delivery.sending]
    digest = crc32("\n".join((*notices, str(delivery.told_missed))).encode())
    return Message(
        id=f"{delivery.target_id}-{delivery.number}-{delivery.sending[0].at_ns // SECOND_NS}-{digest:08x}",
        cluster=cluster,
        cluster_id=cluster_id,
        at_ns=delivery.sending[-1].at_ns,
        notices=delivery.sending,
        missed=delivery.told_missed,
    )


def _line(notice: Notice) -> str:
    took = ""
    if notice.status != "began":
        took = f" ({'after' if notice.status == 'ended' else 'for'} {_duration(notice)})"
    return f"{_WORDS[notice.status]}{took}: {notice.incident.message}"


def _counts(notices: Sequence[Notice]) -> Iterator[str]:
    for status, one, several in (
        ("began", "1 problem", "problems"),
        ("reminder", "1 problem lasts", "problems last"),
        ("ended", "1 resolved", "resolved"),
    ):
        count = sum(notice.status == status for notice in notices)
        if count:
            yield one if count == 1 else f"{count} {several}"


def _duration(notice: Notice) -> str:
    seconds = max(notice.at_ns - notice.incident.began_ns, 0) // SECOND_NS
    for name, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {name}"
    return f"{seconds} s"
