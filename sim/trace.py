"""The last events of a run, for the analysis of a failure."""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from io import TextIOBase
from typing import TextIO

import msgspec

from sim.world.committed import Change
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task
from skep.store.interface import Created, Deleted, Event, Updated, View

LINES = 400
COMMAND: ContextVar[str] = ContextVar("command", default="")
"""Name of the simulated command that is running in this context.  Empty outside of commands."""


class Trace:
    """Commits, faults and requests in chronological order.  Commits are formatted only on demand."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._kept: deque[tuple[float, str | Change]] = deque(maxlen=LINES)

    def add(self, text: str) -> None:
        """Record an event."""
        self._kept.append((self._now(), text))

    def commit(self, change: Change, view: View) -> None:
        """Record a commit."""
        self._kept.append((change.time_s, change))

    @contextmanager
    def with_output_of_commands(self) -> Iterator[None]:
        """Record the output of simulated commands instead of printing it."""
        with (
            redirect_stdout(_CommandOutput(self, sys.stdout)),
            redirect_stderr(_CommandOutput(self, sys.stderr)),
        ):
            yield

    def lines(self) -> list[str]:
        """Return the recorded events, one line each."""
        return [f"{at:9.3f}  {_text_of(what)}" for at, what in self._kept]


class _CommandOutput(TextIOBase):
    """Adds the output of simulated commands to a trace, and passes all other output to the real stream."""

    def __init__(self, trace: Trace, real: TextIO) -> None:
        self._trace = trace
        self._real = real

    def write(self, text: str) -> int:
        command = COMMAND.get()
        if not command:
            return self._real.write(text)
        # Raises TypeError for bytes, by which click recognizes a text stream.
        for line in filter(None, text.split("\n")):
            self._trace.add(f"{command}: {line}")
        return len(text)

    def flush(self) -> None:
        self._real.flush()


def _text_of(what: str | Change) -> str:
    if isinstance(what, str):
        return what
    texts = [text for event in what.events if (text := _event(event))]
    claims = [
        f"{'-' if one.value is None else '+'}{one.key}" for one in what.keys if not one.key.startswith("o/")
    ]
    return f"r{what.revision} by {what.origin}: " + "; ".join([*texts, *claims])


def _event(event: Event) -> str:
    match event:
        case Created(object):
            return f"new {_label_of(object)}"
        case Deleted(object):
            return f"gone {_label_of(object)}"
        case Updated(old, new):
            changed = [
                f"{name} {_short(before)} -> {_short(after)}"
                for name in _SHOWN_FIELDS.get(type(new), ())
                if (before := getattr(old, name)) != (after := getattr(new, name))
            ]
            return f"{_label_of(new)}: " + (", ".join(changed) or "other fields")


_SHOWN_FIELDS: dict[type[msgspec.Struct], tuple[str, ...]] = {
    Task: ("desired_state", "status", "node_id"),
    Service: ("spec", "update_status", "removed_at"),
    Node: ("spec", "status", "session"),
}


def _label_of(object: msgspec.Struct) -> str:
    match object:
        case Task():
            return f"task {object.id[:6]} ({object.service_id}.{object.slot or object.node_id} on {object.node_id})"
        case Service():
            return f"service {object.id} at {object.version.index}"
    return f"{type(object).__name__.lower()} {getattr(object, 'id', '')}"


def _short(value: object) -> str:
    """Return a short text for a value."""
    for name in ("state", "availability", "session_id", "mode"):
        inner = getattr(value, name, None)
        if inner is not None:
            if name == "mode":
                container = value.task_template.container_spec  # type: ignore[attr-defined]
                what = " ".join((container.image, *container.args)) if container else ""
                return f"{inner.name} x{getattr(value, 'replicas', '')} {what}"
            return str(getattr(inner, "value", inner))[:12]
    return str(getattr(value, "value", value))[:30]
