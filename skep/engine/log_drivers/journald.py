"""The log driver journald: sends a datagram of fields for each line, in the journal's native protocol.

Source: moby, daemon/logger/journald/journald.go; systemd, docs/JOURNAL_NATIVE_PROTOCOL.md.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from skep.engine.containers.container import StandardStream
from skep.engine.log_drivers.facts import LogFacts, tag_of
from skep.engine.log_drivers.message import LogMessage
from skep.engine.log_drivers.options import JOURNAL, Options, refuse_unknown
from skep.engine.log_drivers.transport import ANYWHERE, LogConnection, RemoteAddress, connect
from skep.linux.network.guard import Guard
from skep.model.values.times import timestamp

_OWN = frozenset(
    {
        *("CONTAINER_ID", "CONTAINER_ID_FULL", "CONTAINER_NAME", "CONTAINER_TAG", "IMAGE_NAME"),
        *(
            "CONTAINER_LOG_EPOCH",
            "CONTAINER_LOG_ORDINAL",
            "CONTAINER_PARTIAL_ID",
            "CONTAINER_PARTIAL_ORDINAL",
        ),
        *("CONTAINER_PARTIAL_LAST", "CONTAINER_PARTIAL_MESSAGE"),
        *("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "SYSLOG_TIMESTAMP"),
    }
)
"""Fields that a label or variable can never set."""


def check(options: Options) -> None:
    """Check the driver's options.  Raises: InvalidArgument, in Docker's words."""
    refuse_unknown("journald", options, frozenset())


class Journald:
    """A connection to this machine's journal, which listens at ``socket``."""

    def __init__(
        self, options: Options, facts: LogFacts, guard: Guard = ANYWHERE, socket: Path = JOURNAL
    ) -> None:
        self._guard = guard
        tag = tag_of(options, facts)
        self._attributes: Mapping[str, str] = {
            field: value for name, value in facts.attributes.items() if (field := field_name(name))
        }
        self._fields: Mapping[str, str] = {
            "CONTAINER_ID": facts.id[:12],
            "CONTAINER_ID_FULL": facts.id,
            "CONTAINER_NAME": facts.name,
            "CONTAINER_TAG": tag,
            "IMAGE_NAME": facts.image,
            "SYSLOG_IDENTIFIER": tag,
            "CONTAINER_LOG_EPOCH": os.urandom(32).hex(),
        }
        self.confirms_each = True
        self._ordinal = 0
        self._socket = socket
        self._connection: LogConnection | None = None

    async def open(self) -> None:
        """Connect to the journal."""
        self._connection = await connect(
            RemoteAddress(network="unixgram", path=str(self._socket)), self._guard
        )

    async def send(self, message: LogMessage) -> None:
        assert self._connection is not None, "it is open"
        await self._connection.send(self.datagram(message))

    async def flush(self) -> None:
        """Do nothing, because the journal has a datagram once the socket has accepted it."""

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def datagram(self, message: LogMessage) -> bytes:
        """Encode the fields of one line."""
        self._ordinal += 1
        fields = {
            **self._fields,
            "SYSLOG_TIMESTAMP": timestamp(message.timestamp_ns),
            "CONTAINER_LOG_ORDINAL": str(self._ordinal),
            "PRIORITY": "3" if message.stream is StandardStream.STDERR else "6",
        }
        if message.partial is not None:
            fields |= {
                "CONTAINER_PARTIAL_ID": message.partial.id,
                "CONTAINER_PARTIAL_ORDINAL": str(message.partial.ordinal),
                "CONTAINER_PARTIAL_LAST": "true" if message.partial.last else "false",
            }
            if not message.partial.last:
                fields["CONTAINER_PARTIAL_MESSAGE"] = "true"
        # Fields from a user's labels come last, and never replace the node's own fields.
        further = {name: value for name, value in self._attributes.items() if name not in _OWN}
        every = (fields | further).items()
        parts = [_field(name, value.encode(errors="surrogateescape")) for name, value in every]
        return b"".join((*parts, _field("MESSAGE", message.line)))


def field_name(name: str) -> str:
    """Convert the name of a label or variable to a field name: capitals, digits and underscores, without a leading
    underscore.
    """
    found = "".join(
        char if "0" <= char <= "9" or "A" <= char <= "Z" else "_"
        for char in "".join(char.upper() if "a" <= char <= "z" else char for char in name)
    )
    return found.lstrip("_")


def _field(name: str, value: bytes) -> bytes:
    if b"\n" not in value:
        return b"%b=%b\n" % (name.encode(), value)
    return b"%b\n%b%b\n" % (name.encode(), len(value).to_bytes(8, "little"), value)
