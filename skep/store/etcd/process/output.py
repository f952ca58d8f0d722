"""Reads etcd's stderr: logs its JSON lines as log events of Skep, and finds the reason of its exit."""

import asyncio
import json
from typing import Any

import structlog

log = structlog.get_logger("etcd")

_NOISE = (
    "Running http and grpc server on single port",
    "simple token is not cryptographically signed",
)
"""Messages that every member logs and that are left out."""

_LEVELS = {"debug": "debug", "info": "info", "warn": "warning"}

_MAX_PLAIN = 500


class EtcdOutput:
    """Reads one process's stderr to its end.  ``reason`` is the last fatal line, or else the last line."""

    def __init__(self) -> None:
        self._fatal = ""
        self._last = ""

    @property
    def reason(self) -> str:
        """Why the process ended, as far as its log shows, or "no output"."""
        return self._fatal or self._last or "no output"

    async def read(self, stderr: asyncio.StreamReader) -> None:
        """Log line by line until the process closes its end."""
        while True:
            try:
                line = await stderr.readline()
            except ValueError:
                continue  # longer than the buffer: dropped by asyncio
            if not line:
                return
            self.take(line)

    def take(self, line: bytes) -> None:
        """Log one line."""
        entry = _parsed(line)
        if entry is None:
            text = line.decode(errors="replace").strip()[:_MAX_PLAIN]
            if text.startswith("panic:") or not self._last:
                self._fatal = self._fatal or (text if text.startswith("panic:") else "")
            self._last = self._last or text
            log.warning("etcd output", line=text)
            return
        message = str(entry.pop("msg", ""))
        if any(noise in message for noise in _NOISE) or _is_probe(message, entry):
            return
        level = str(entry.pop("level", "warn"))
        for name in ("ts", "caller", "stacktrace", "logger"):
            entry.pop(name, None)
        summary = f"{message}: {entry['error']}" if "error" in entry else message
        self._last = summary
        if level in ("fatal", "panic", "dpanic"):
            self._fatal = summary
        details = {f"etcd_{name.replace('-', '_')}": value for name, value in entry.items()}
        getattr(log, _LEVELS.get(level, "error"))(message, **details)


def _is_probe(message: str, entry: dict[str, Any]) -> bool:
    """Return whether the line reports a probe by another manager, which closes its connection before the handshake."""
    return message.startswith("rejected connection") and entry.get("error") == "EOF"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
