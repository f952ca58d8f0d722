"""Spans of a service's life for OpenTelemetry: operations, their times and their parents.

Trace and span ids are derived from object ids, so they do not have to be transferred.  A trace is one version of a
service's spec, and every process that has the task can compute its id (decision 106).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from typing import Any

import msgspec

NowNs = Callable[[], int]
"""Nanoseconds since the epoch."""
NO_ATTRIBUTES: Mapping[str, str] = {}


def trace_id(service: str, spec_version: int) -> str:
    """Return the trace id of one version of a service's spec: 32 hexadecimal digits."""
    return sha256(f"{service}:{spec_version}".encode()).hexdigest()[:32]


def span_id(*parts: str) -> str:
    """Return the span id of the object or step named by ``parts``: 16 hexadecimal digits."""
    return sha256(":".join(parts).encode()).hexdigest()[:16]


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One step."""

    trace: str
    id: str
    parent: str = ""
    name: str
    begin_ns: int
    end_ns: int
    attributes: Mapping[str, str] = NO_ATTRIBUTES
    error: str = ""
    """Reason of the failure.  Empty after success."""
    link: tuple[str, str] | None = None
    """Trace and span of the client, from its ``traceparent``."""


class Part(msgspec.Struct):
    """A step inside a recorded step.  ``result`` is its result if the recorder needs it."""

    name: str
    begin_ns: int
    end_ns: int = 0
    error: str = ""
    result: Any = None


class Recording:
    """Parts of one step, in the order of their start."""

    def __init__(self, now_ns: NowNs) -> None:
        self._now_ns = now_ns
        self.parts: list[Part] = []

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Record the block as a part, including its failure."""
        part = Part(name, self._now_ns())
        self.parts.append(part)
        try:
            yield part
        except BaseException as error:
            part.error = str(error) or type(error).__name__
            raise
        finally:
            part.end_ns = self._now_ns()


_RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(now_ns: NowNs) -> Iterator[Recording]:
    """Record the steps ``within`` the block and the tasks that it starts."""
    found = Recording(now_ns)
    token = _RECORDING.set(found)
    try:
        yield found
    finally:
        _RECORDING.reset(token)


@contextmanager
def within(name: str) -> Iterator[Part | None]:
    """Record the block as a part of the current recording, if any."""
    found = _RECORDING.get()
    if found is None:
        yield None
    else:
        with found.part(name) as part:
            yield part
