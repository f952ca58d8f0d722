"""Protocol between the node process and the process that sends logs: lines of JSON."""

from collections.abc import Mapping

import msgspec

from skep.engine.log_drivers.facts import LogFacts

LINE_BYTES_MAX = 4 << 20
"""Limit in bytes for an order, which contains a container's labels and variables."""


class Forward(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Send a container's output.  ``current`` is its newest log file."""

    id: str
    current: str
    driver: str
    options: Mapping[str, str]
    facts: LogFacts
    has_ended: bool
    is_restricted: bool = False
    """Whether a user below administrator chose the log driver, so that ``transport.Guard`` limits its connections."""


class Peers(msgspec.Struct, frozen=True, tag=True):
    """The addresses of the other nodes."""

    addresses: tuple[str, ...]


class End(msgspec.Struct, frozen=True, tag=True):
    """The container has ended."""

    id: str


class Hold(msgspec.Struct, frozen=True, tag=True):
    """The container is about to be removed.  The response is ``Held``."""

    id: str


class Held(msgspec.Struct, frozen=True, tag=True):
    """The container's files may be removed."""

    id: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """The container's output was sent, or given up."""

    id: str


class Report(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """An entry for the node's log."""

    id: str
    driver: str
    event: str
    reason: str
    lines: int


Order = Forward | End | Hold | Peers
Response = Held | Done | Report
