"""Structured logs on standard error: one event per line, as text or as JSON.

A line that cannot be written is lost without an error: processes may outlive the one whose output they inherited, and
must not fail because nothing reads their output.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import msgspec
import structlog


class LogSettings(msgspec.Struct, frozen=True):
    """Log settings for manager and net, in a file in the run directory."""

    debug: bool = False
    log_format: str = "text"

    def write(self, path: Path) -> None:
        """Replace ``path``.  A reader sees the old or the new content."""
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_bytes(msgspec.json.encode(self))
        beside.rename(path)

    @staticmethod
    def read(path: Path) -> "LogSettings":
        """Return the settings in ``path``, or the defaults if it is missing or invalid."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=LogSettings)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return LogSettings()


def follow(path: Path) -> LogSettings:
    """Apply the settings in ``path`` now and after each SIGHUP.  Return the current ones."""

    def apply() -> LogSettings:
        settings = LogSettings.read(path)
        configure(debug=settings.debug, log_format=settings.log_format)
        return settings

    def apply_again(*_: object) -> None:
        structlog.get_logger().info("log settings read again", debug=apply().debug)

    signal.signal(signal.SIGHUP, apply_again)  # before the first read, so that no change is missed
    return apply()


def name_process(name: str) -> None:
    """Add ``process=<name>`` to every line from now on: node, manager, net."""
    _Process.name = name


def configure(*, debug: bool = False, log_format: str = "text", process: str = "") -> None:
    """Set up logging of this process.  Call it again to change it."""
    if process:
        name_process(process)
    level = logging.DEBUG if debug else logging.INFO
    structlog.configure(
        processors=[
            _drop_supposed,
            _add_process,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            _as_json if log_format == "json" else _as_text,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Lines,
    )
    logging.basicConfig(handlers=[_FromLibraries()], level=logging.WARNING, force=True)


_is_supposed: ContextVar[bool] = ContextVar("_is_supposed", default=False)


@contextmanager
def supposed() -> Iterator[None]:
    """Drop lines about events that are only supposed (``skep what-if``).  Tracebacks, which show bugs, are kept."""
    token = _is_supposed.set(True)
    try:
        yield
    finally:
        _is_supposed.reset(token)


def _drop_supposed(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if _is_supposed.get() and not event.get("exc_info"):
        raise structlog.DropEvent
    return event


class _Process:
    """Name of this process.  Not a context variable, because threads log as well."""

    name = ""


def _add_process(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if _Process.name:
        event["process"] = _Process.name
    return event


class _Lines:
    """Writes lines to the current standard error."""

    def __init__(self, *_: object) -> None:
        pass

    def msg(self, line: str) -> None:
        try:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass

    debug = info = warning = error = critical = exception = log = msg


class _FromLibraries(logging.Handler):
    """Passes messages that libraries log with the standard module to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = record.getMessage()
        except (TypeError, ValueError):
            event = str(record.msg)
        structlog.get_logger().log(
            record.levelno,
            event,
            logger=record.name,
            **({"exc_info": record.exc_info} if record.exc_info else {}),
        )


_as_json = structlog.processors.JSONRenderer(default=str)


def _as_text(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    """Format ``2026-01-31T12:00:00Z info    task rejected task=abc reason='no image'``, with tracebacks below."""
    traceback = event.pop("exception", "") or event.pop("stack", "")
    head = f"{event.pop('timestamp')} {event.pop('level'):<8} {event.pop('event')}"
    line = " ".join([head, *(f"{key}={_shown(value)}" for key, value in event.items())])
    return f"{line}\n{traceback}" if traceback else line


def _shown(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and " " not in text else repr(text)
