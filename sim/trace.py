"""The last events of a run, for the analysis of a failure."""

from collections import deque
from collections.abc import Callable

import msgspec

from sim.committed import Change
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task
from skep.store.interface import Created, Deleted, Event, Updated, View

LINES = 400


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

    def lines(self) -> list[str]:
        """Return the recorded events, one line each."""
        return [f"{at:9.3f}  {_text_of(what)}" for at, what in self._kept]


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
                return (
                    f"{inner.name} x{getattr(value, 'replicas', '')} {container.image if container else ''}"
                )
            return str(getattr(inner, "value", inner))[:12]
    return str(getattr(value, "value", value))[:30]
