"""Reads what a playground said last, for a failed test, because the playground does not outlive it.

That is the last log lines of each node, and the tasks with their errors as ``docker service ps`` shows them.
"""

import json
import os
import subprocess
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_LINES = 25
_LONGEST = 400
_QUIET = frozenset({"debug", "info"})
_UPDATE = (
    "{{.Spec.Name}}: {{if .UpdateStatus}}update {{.UpdateStatus.State}}: {{.UpdateStatus.Message}}{{end}}"
)
_TASK = "  {{.ID}} {{.Name}} {{.Node}} {{.DesiredState}} {{.CurrentState}} {{.Error}}"

live: dict[str, Path] = {}
"""Directories of the running playgrounds, by name."""
ended: dict[str, str] = {}
"""Last log lines of playgrounds that ended in the middle of a test."""


def of(directory: Path) -> str:
    """Return the last warnings and errors of each node, and the tasks."""
    lines = (line for log in sorted(directory.glob("*/skep.log")) for line in _of_node(log))
    return "\n".join([*lines, _tasks(directory)])


def reported() -> Iterator[tuple[str, str]]:
    """Yield name and last words of each playground.  Those of ended ones are yielded once."""
    for name, directory in live.items():
        yield name, of(directory)
    while ended:
        yield ended.popitem()


def _tasks(directory: Path) -> str:
    """Return the update and the tasks of each service, or why they cannot be read."""
    try:
        manager = json.loads((directory / "cluster.json").read_text())["nodes"][0]["endpoint"]
        services = _docker(manager, "service", "ls", "--quiet").split()
        return "".join(
            _docker(manager, "service", "inspect", "--format", _UPDATE, service)
            + _docker(manager, "service", "ps", "--no-trunc", "--format", _TASK, service)
            for service in services
        )
    except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
        return f"tasks not read: {error}"


def _docker(manager: str, *words: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": manager}
    command = ["docker", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=20, check=True
    ).stdout


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
