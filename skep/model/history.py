"""The cluster's history: what clients asked through the API, and what happened, with its reason.

One ``Entry`` is what ``GET /skep/history`` shows and what managers keep (``manager/journal``).  No entry has the body
of a request, the data of a secret or the value of a variable.
"""

import re
from collections.abc import Mapping
from enum import Enum

from msgspec.structs import replace

from skep.model.encoding import ApiObject, always
from skep.model.service import Service, ServiceSpec
from skep.model.times import Timestamp

STACK_LABEL = "com.docker.stack.namespace"
MESSAGE_CHARACTERS_MAX = 500
NAME_CHARACTERS_MAX = 100
PATH_CHARACTERS_MAX = 200
"""An entry takes less than 1 KiB, except with names of many bytes per character."""
MASK = "***"


class Kind(Enum):
    """``REQUEST``: the audit log; ``CHANGE``: what came of it, and what managers did by themselves."""

    REQUEST = "request"
    CHANGE = "change"


class Severity(Enum):
    """Of an entry: ``ERROR`` for what failed or was lost, ``WARNING`` for what is not as usual."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class By(ApiObject):
    """The client of a request, as far as it is known."""

    user: str = ""
    """The name of the user, or in the certificate; at a unix socket ``root`` or ``uid 1000``, as a look-up of the
    account's name may ask another machine."""
    uid: int | None = None
    pid: int | None = None
    node: str = ""
    """Host name of the node whose API the client used."""
    through: str = ""
    """How the client proved it: the value of an ``access.Origin``; empty: it is not known."""

    @property
    def summary(self) -> str:
        """``root (uid 0, pid 4711)``, or how the client came."""
        account = f"uid {self.uid}, pid {self.pid}" if self.uid is not None else ""
        how = account or self.through
        return f"{self.user} ({how})" if self.user and how else self.user or how or "not known"


class Entry(ApiObject):
    """One thing that happened.  Names are those of that time."""

    id: str = always("")
    """Unique."""
    time: Timestamp = always(Timestamp(""))
    """By the clock of the manager that saw it."""
    revision: int = always(0)
    """Of the store, when it showed; 0: the request wrote nothing."""
    kind: Kind = always(Kind.CHANGE)
    type: str = always("")
    """Of the object: ``service``, ``task``, ``node``, ``secret``; ``journal``: about the history itself."""
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
    """A sentence.  Parts of it come from users and containers."""
    count: int = always(1)
    """How many of the same kind it stands for."""
    method: str = ""
    path: str = ""
    status: int = 0
    by: By | None = None
    """These four: of requests."""


class HistoryPage(ApiObject):
    """Response of ``GET /skep/history``.

    ``next``: the cursor of the next page, empty: there is none; ``oldest``: time of the oldest entry; ``oldest_state``:
    from which time on ``GET /skep/state`` has a response; both empty: not known.
    """

    entries: tuple[Entry, ...] = always(())
    next: str = always("")
    oldest: Timestamp = always(Timestamp(""))
    oldest_state: Timestamp = always(Timestamp(""))
    total: int = always(0)


def bounded(entry: Entry) -> Entry:
    """``entry`` with its texts cut to their bounds."""
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
"""``type`` and ``action`` of a request are words of its path, which a client chooses."""


def cut(text: str, characters: int) -> str:
    """``text``, with its end replaced where it is too long."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


_CREDENTIAL = re.compile(
    r"passw|passphrase|secret|token|credential|api_?key|access_?key|private_?key|auth|(?:^|_)(?:key|pwd|pass|dsn)(?:$|_)",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(://[^/@:\s]*:)[^/@\s]+@")


def masked(variable: str) -> str:
    """``NAME=VALUE`` without a value that looks like a credential, by its name or as the password of a URL."""
    name, equals, value = variable.partition("=")
    if equals and value and _CREDENTIAL.search(name):
        return f"{name}={MASK}"
    return _IN_URL.sub(rf"\1{MASK}@", variable)


def masked_text(text: str) -> str:
    """``text`` with each ``NAME=VALUE`` in it ``masked``: errors quote what they refuse."""
    return _ASSIGNMENT.sub(lambda found: masked(found[0]), text)


_ASSIGNMENT = re.compile(r"[\w.-]+=[^\s\"',;]+|\S+://\S+")


def without_credentials(service: Service) -> Service:
    """``service`` with the environment of its specs ``masked``."""
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


def stack_of(labels: Mapping[str, str]) -> str:
    """The stack that an object with ``labels`` is part of; empty: none."""
    return labels.get(STACK_LABEL, "")
