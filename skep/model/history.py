"""The cluster's history: clients' requests to the API, and events with their reasons.

``GET /skep/history`` shows entries (``JournalEntry``), and managers keep them (``manager/journal``).  No entry has the
body of a request, the data of a secret or the value of a variable.
"""

import re
from enum import Enum

from msgspec.structs import replace

from skep.model.service import Service, ServiceSpec
from skep.model.values.encoding import ApiObject, always
from skep.model.values.times import Timestamp

MESSAGE_CHARACTERS_MAX = 500
"""Longest message of an entry.  The history keeps ten thousand entries."""
NAME_CHARACTERS_MAX = 100
"""Longest name in an entry."""
PATH_CHARACTERS_MAX = 200
"""Longest path in an entry.  With these limits, an entry takes less than 1 KiB unless its characters take several bytes
each.
"""
MASK = "***"


class EntryType(Enum):
    """``REQUEST`` is the audit log.  ``CHANGE`` is the result of a request, or an action of the managers themselves."""

    REQUEST = "request"
    CHANGE = "change"


class Severity(Enum):
    """Severity of an entry: ``ERROR`` for failures and losses, ``WARNING`` for unusual states."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class By(ApiObject):
    """The client of a request.  Unknown fields are empty."""

    user: str = ""
    """The user's name, or the name in the client's certificate.  Clients of a Unix socket are called ``root`` or ``uid
    1000``, because looking up an account's name may query another machine.
    """
    uid: int | None = None
    pid: int | None = None
    node: str = ""
    """Host name of the node whose API the client used."""
    through: str = ""
    """The client's proof of identity, a value of ``access.Origin``, or empty if unknown."""

    @property
    def summary(self) -> str:
        """Return a text such as ``root (uid 0, pid 4711)``, or how the client connected."""
        account = f"uid {self.uid}, pid {self.pid}" if self.uid is not None else ""
        how = account or self.through
        return f"{self.user} ({how})" if self.user and how else self.user or how or "not known"


class JournalEntry(ApiObject):
    """One event.  It keeps the names that its objects had at that time."""

    id: str = always("")
    """Unique id."""
    time: Timestamp = always(Timestamp(""))
    """Time by the clock of the manager that recorded it."""
    revision: int = always(0)
    """Revision of the store at that time, or 0 if the request wrote nothing."""
    kind: EntryType = always(EntryType.CHANGE)
    type: str = always("")
    """Type of the object: ``service``, ``task``, ``node``, ``secret``, or ``journal`` for the history itself."""
    action: str = always("")
    severity: Severity = always(Severity.INFO)
    object_id: str = ""
    name: str = ""
    service_id: str = ""
    service: str = ""
    node_id: str = ""
    node: str = ""
    stack: str = ""
    task_id: str = ""
    message: str = always("")
    """A sentence, parts of which come from users and containers."""
    count: int = always(1)
    """Number of events that this entry stands for.  Only the events of requests are all equal to it."""
    method: str = ""
    path: str = ""
    status: int = 0
    by: By | None = None
    """This field and the next three belong to requests."""


class HistoryPage(ApiObject):
    """Response of ``GET /skep/history``.

    Args:
        next: Cursor of the next page, or empty on the last page.
        oldest: Time of the oldest entry, or empty if unknown.
        oldest_state: Earliest time for which ``GET /skep/state`` can respond, or empty if unknown.
    """

    entries: tuple[JournalEntry, ...] = always(())
    next: str = always("")
    oldest: Timestamp = always(Timestamp(""))
    oldest_state: Timestamp = always(Timestamp(""))
    total: int = always(0)


def bounded(entry: JournalEntry) -> JournalEntry:
    """Return ``entry`` with its texts cut to their limits."""
    names = [getattr(entry, name) for name in _NAMES]
    if (
        len(entry.message) <= MESSAGE_CHARACTERS_MAX
        and len(entry.path) <= PATH_CHARACTERS_MAX
        and max(map(len, names)) <= NAME_CHARACTERS_MAX
    ):
        return entry
    return replace(
        entry,
        message=cut(entry.message, MESSAGE_CHARACTERS_MAX),
        path=cut(entry.path, PATH_CHARACTERS_MAX),
        **{name: cut(getattr(entry, name), NAME_CHARACTERS_MAX) for name in _NAMES},
    )


_NAMES = ("type", "action", "object_id", "name", "service", "node", "stack", "method")
"""Fields that are cut to ``NAME_CHARACTERS_MAX``.  Even ``type`` and ``action`` need a limit, because a request's entry
takes them from its path, which a client chooses.
"""


def cut(text: str, characters: int) -> str:
    """Return ``text``, with its end replaced if it is too long."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


_CREDENTIAL = re.compile(
    r"passw|passphrase|secret|token|credential|api_?key|access_?key|private_?key|auth|(?:^|_)(?:key|pwd|pass|dsn)(?:$|_)",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(://[^/@:\s]*:)[^/@\s]+@")


def masked(variable: str) -> str:
    """Return ``NAME=VALUE``, with a value masked that looks like a credential, by its name or as a URL's password."""
    name, equals, value = variable.partition("=")
    if equals and value and _CREDENTIAL.search(name):
        return f"{name}={MASK}"
    return _IN_URL.sub(rf"\1{MASK}@", variable)


def masked_text(text: str) -> str:
    """Return ``text`` with every ``NAME=VALUE`` in it ``masked``, because errors quote refused values."""
    return _ASSIGNMENT.sub(lambda found: masked(found[0]), text)


_ASSIGNMENT = re.compile(r"[\w.-]+=[^\s\"',;]+|\S+://\S+")


def without_credentials(service: Service) -> Service:
    """Return ``service`` with the environment of its specs ``masked``."""
    previous = service.previous_spec
    return replace(
        service,
        spec=_without_credentials(service.spec),
        previous_spec=_without_credentials(previous) if previous is not None else None,
    )


def _without_credentials(spec: ServiceSpec) -> ServiceSpec:
    container = spec.task_template.container_spec
    if container is None or not container.env:
        return spec
    container = replace(container, env=tuple(map(masked, container.env)))
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))
