"""What the nodes of playgrounds said last: shown with a test that fails, because the playground does not outlive it."""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_LINES = 25
_LONGEST = 400
_QUIET = frozenset({"debug", "info"})

live: dict[str, Path] = {}
"""Playgrounds that are up now: name -> directory."""
ended: dict[str, str] = {}
"""What was said in those that ended in the middle of a test."""


def of(directory: Path) -> str:
    """Warnings and worse of each node, the last of them."""
    return "\n".join(line for log in sorted(directory.glob("*/skep.log")) for line in _of_node(log))


def reported() -> Iterator[tuple[str, str]]:
    """Name and words of each playground; those of ended ones once."""
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
    """Whether it is no message of our own that says that all is well."""
    try:
        said = json.loads(line)
    except ValueError:
        return bool(line.strip())
    return not isinstance(said, dict) or said.get("level") not in _QUIET
