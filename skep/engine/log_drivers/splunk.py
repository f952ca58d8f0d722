"""The log driver splunk: batches of events to an HTTP Event Collector.

Source: moby, daemon/logger/splunk/splunk.go.
"""

import gzip
import socket
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from skep.engine.log_drivers.facts import LogFacts, tag_of
from skep.engine.log_drivers.message import LogMessage, text_of
from skep.engine.log_drivers.options import Options, boolean, integer, refuse_unknown
from skep.engine.log_drivers.transport import ANYWHERE, SEND_S, RemoteTlsFiles, client_context
from skep.errors import InvalidArgument
from skep.linux.network.guard import Guard
from skep.model.values.times import SECOND_NS

if TYPE_CHECKING:
    import aiohttp

KNOWN = frozenset(
    f"splunk-{name}"
    for name in (
        *("url", "token", "source", "sourcetype", "index", "capath", "caname", "insecureskipverify"),
        *("format", "verify-connection", "gzip", "gzip-level", "index-acknowledgment"),
    )
)
_PATH = "/services/collector/event/1.0"
_FORMATS = ("inline", "json", "raw")
_LEVEL_DEFAULT = 6
"""Compression level that -1 means, zlib's default."""


def check(options: Options) -> None:
    """Check the driver's options.  Raises: InvalidArgument, in Docker's words."""
    refuse_unknown("splunk", options, KNOWN)
    _url(options)
    if "splunk-token" not in options:
        raise InvalidArgument("splunk: splunk-token is expected")
    for name in ("insecureskipverify", "verify-connection", "gzip", "index-acknowledgment"):
        boolean(options, f"splunk-{name}")
    level = integer(options, "splunk-gzip-level", -1)
    if not -1 <= level <= 9:
        raise InvalidArgument(
            f"not supported level '{level}' for splunk-gzip-level (supported values between -1 and 9)"
        )
    if options.get("splunk-format", "inline") not in _FORMATS:
        raise InvalidArgument(
            f"unknown format specified {options['splunk-format']}, supported formats are inline, json and raw"
        )


class Splunk:
    """A client of an HTTP Event Collector."""

    def __init__(self, options: Options, facts: LogFacts, guard: Guard = ANYWHERE) -> None:
        self._guard = guard
        self._url = _url(options)
        self._tls = RemoteTlsFiles(
            ca=options.get("splunk-capath", ""),
            is_ca_alone=True,
            verifies=not boolean(options, "splunk-insecureskipverify"),
        )
        self._server_name = options.get("splunk-caname") or None
        self._token = options["splunk-token"]
        self._format = options.get("splunk-format", "inline")
        self._gzip_level = (
            integer(options, "splunk-gzip-level", -1) if boolean(options, "splunk-gzip") else None
        )
        self._has_channel = boolean(options, "splunk-index-acknowledgment")
        self._tag = tag_of(options, facts) if options.get("tag", "{{.ID}}") else ""
        self._attributes = facts.attributes
        self._common = {"host": facts.hostname} | {
            name: value
            for name in ("source", "sourcetype", "index")
            if (value := options.get(f"splunk-{name}", ""))
        }
        self.confirms_each = False
        self._events: list[bytes] = []
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Prepare a session, which connects with the first batch."""
        self._events.clear()
        import aiohttp  # here: it takes much memory, which the other drivers do not need

        context = client_context(self._tls) if self._url.startswith("https:") else None
        timeout = aiohttp.ClientTimeout(total=SEND_S)

        def allowed(info: tuple[Any, ...]) -> socket.socket:
            self._guard.check(str(info[4][0]))
            return socket.socket(info[0], info[1], info[2])

        tls = context if context is not None else True
        connector = aiohttp.TCPConnector(ssl=tls, socket_factory=allowed)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def send(self, message: LogMessage) -> None:
        event = self.event(message)
        if event is not None:
            self._events.append(msgspec.json.encode(event))

    async def flush(self) -> None:
        """Post the queued events once."""
        import aiohttp

        assert self._session is not None, "it is open"
        if not self._events:
            return
        body, headers = b"".join(self._events), {"Authorization": f"Splunk {self._token}"}
        self._events.clear()
        if self._gzip_level is not None:
            body = gzip.compress(body, self._gzip_level if self._gzip_level >= 0 else _LEVEL_DEFAULT, mtime=0)
            headers["Content-Encoding"] = "gzip"
        if self._has_channel:
            headers["X-Splunk-Request-Channel"] = str(uuid.uuid4())
        try:
            async with self._session.post(
                self._url,
                data=body,
                headers=headers,
                server_hostname=self._server_name,
                allow_redirects=False,  # the token is only for this host
            ) as response:
                text = await response.content.read(1024)
                if response.status != 200:
                    raise ConnectionError(
                        f"failed to send event - {response.status} {response.reason} - "
                        f"{text.decode(errors='replace')}"
                    )
        except (TimeoutError, aiohttp.ClientError) as error:
            raise ConnectionError(str(error) or "the collector did not respond in time") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def event(self, message: LogMessage) -> Mapping[str, Any] | None:
        """Return the event for ``message``, or None for a blank line, which a collector does not accept."""
        text = text_of(message.line)
        event: Any
        if self._format == "raw":
            if not text.strip():
                return None
            words = [self._tag] * bool(self._tag)
            words += [f"{name}={value}" for name, value in self._attributes.items()]
            event = " ".join((*words, text))
        else:
            line: Any = text
            if self._format == "json":
                try:
                    line = msgspec.Raw(msgspec.json.encode(msgspec.json.decode(message.line)))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    line = text
            event = {"line": line, "source": message.source}
            if self._tag:
                event["tag"] = self._tag
            if self._attributes:
                event["attrs"] = self._attributes
        return {"event": event, "time": f"{message.timestamp_ns / SECOND_NS:f}", **self._common}


def _url(options: Options) -> str:
    text = options.get("splunk-url")
    if text is None:
        raise InvalidArgument("splunk: splunk-url is expected")
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise InvalidArgument(f"splunk: failed to parse {text} as url value in splunk-url") from error
    if (
        parts.scheme not in ("http", "https")
        or not parts.netloc
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
    ):
        raise InvalidArgument("splunk: expected format scheme://dns_name_or_ip:port for splunk-url")
    return f"{parts.scheme}://{parts.netloc}{_PATH}"
