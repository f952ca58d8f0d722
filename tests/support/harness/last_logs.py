"""Last log lines of playground nodes, shown with a failed test, because the playground does not outlive it."""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_LINES = 25
_LONGEST = 400
_QUIET = frozenset({"debug", "info"})

live: dict[str, Path] = {}
"""Directories of the running playgrounds, by name."""
ended: dict[str, str] = {}
"""Last log lines of playgrounds that ended in the middle of a test."""


def of(directory: Path) -> str:
    """Return the last warnings and errors of each node."""
    return "\n".join(line for log in sorted(directory.glob("*/skep.log")) for line in _of_node(log))


def reported() -> Iterator[tuple[str, str]]:
    """Yield name and log lines of each playground.  Those of ended ones are yielded once."""
    for name, directory in live.items():
        yield name, of(directory)
    while ended:
        yield ended.popitem()


def _of_node(log: Path) -> list[str]:
    kept: deque[str] = deque(maxlen=_LINES)
    with log.open(errors="replace") as lines:
        kept.extend(line.rstrip()[:_LONGEST] for line in lines if _is_loud(line))
    return [f"{log.parent.name}: {line}" for line in kept]


def _is_loud(line: str) -> bool:
    """Return whether to show the line: all lines except our own messages with a low level."""
    try:
        said = json.loads(line)
    except ValueError:
        return bool(line.strip())
    return not isinstance(said, dict) or said.get("level") not in _QUIET
