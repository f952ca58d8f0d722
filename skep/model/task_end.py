"""Reasons why tasks ended, as observed by their nodes, kept after the container and the node are removed.

All parts are bounded, because the store keeps them for every ended task.
"""

import re
import signal
from collections.abc import Iterable
from enum import Enum

from msgspec.structs import replace

from skep.model.values.encoding import ApiObject, always, to_json
from skep.model.values.times import ZERO_TIME, Timestamp

LAST_LINES_MAX = 20
"""Last lines of output that are kept of a task's end."""
LAST_LINES_BYTES_MAX = 4096
"""Bytes of all kept lines together, encoded."""
HEALTH_OUTPUT_BYTES_MAX = 1024
"""Bytes of the output of the last health check."""
HEALTH_COMMAND_BYTES_MAX = 256
"""Bytes of the health check's command."""
SIGNALED = 128
"""Shells and Docker report the signal that ended a process as 128 plus its number."""
_SHOWN_CHARACTERS_MAX = 200
"""Characters of a line that a sentence quotes."""
FAILED_CHECK = "starting: "
"""Start of the message of a task that is starting while its health check fails.  The failure follows, in words."""
SEQUENCE = re.compile(r"\x1b\[[0-?]{0,64}[ -/]{0,8}[@-~]")
"""A control sequence of a terminal, as for a color."""
_WORD_CHARACTERS_MAX = 32
"""Longest word that names a cause or a signal."""


class EndCause(Enum):
    """The causes that nodes of this version report.  Causes of later versions are kept and shown unchanged."""

    EXIT = "exit"
    SIGNAL = "signal"
    OUT_OF_MEMORY = "out-of-memory"
    UNHEALTHY = "unhealthy"
    STOP_TIMEOUT = "stop-timeout"
    START_FAILED = "start-failed"
    NODE_RESTARTED = "node-restarted"
    """The machine restarted while the container ran, in order or not."""
    MONITOR_LOST = "monitor-lost"
    """The container's monitor was killed, so nobody saw how the container ended."""
    NODE_LOST = "node-lost"
    """Set by managers: the task's node is down, or was removed with the task on it."""


INTERRUPTIONS = frozenset({EndCause.NODE_RESTARTED.value})
"""Causes that nodes report as FAILED, as Docker does, although the task itself did not fail.

A lost monitor counts as a failure: the container may be what kills it, by using up the memory, again and again.
"""


class KeptLine(ApiObject):
    """A line of output, without its newline.  ``stream``: stdout or stderr."""

    timestamp: Timestamp = always(ZERO_TIME)
    stream: str = always("stdout")
    text: str = always("")


class TaskEnd(ApiObject):
    """Reason why a task ended.  Not in Docker's API.

    ``cause``: the value of an ``EndCause``.  ``health_output``: output of the last failed health check.  ``lines``: the
    last lines of output, oldest first.  ``health_command``, ``health_failures`` (in a row) and ``health_exit_code``
    (None if the check could not be run, or timed out) are set for ``unhealthy``.
    """

    cause: str = always("")
    signal: str = ""
    grace: int = 0
    """Nanoseconds between the stop signal and the kill (``stop-timeout``)."""
    health_output: str = ""
    lines: tuple[KeptLine, ...] = ()
    health_command: str = ""
    health_failures: int = 0
    health_exit_code: int | None = None


def bounded_end(end: TaskEnd, lines_max: int = LAST_LINES_MAX) -> TaskEnd:
    """Return ``end`` with long texts cut and only the last ``lines_max`` lines."""
    return replace(
        end,
        cause=end.cause[:_WORD_CHARACTERS_MAX],
        signal=end.signal[:_WORD_CHARACTERS_MAX],
        health_output=cut(end.health_output, HEALTH_OUTPUT_BYTES_MAX),
        health_command=cut(end.health_command, HEALTH_COMMAND_BYTES_MAX),
        lines=_last_lines(end.lines, min(lines_max, LAST_LINES_MAX)),
    )


def _last_lines(lines: Iterable[KeptLine], lines_max: int) -> tuple[KeptLine, ...]:
    kept: list[KeptLine] = []
    left = LAST_LINES_BYTES_MAX
    for line in reversed(tuple(lines)[-lines_max:] if lines_max > 0 else ()):
        text = cut(line.text, left)
        left -= len(to_json(text))
        if text or not line.text:
            kept.append(replace(line, text=text) if text != line.text else line)
        if text != line.text or left <= 0:
            break
    return tuple(reversed(kept))


def cut(text: str, most: int) -> str:
    """Return the start of ``text`` that takes at most ``most`` bytes as JSON."""
    while text and (size := len(to_json(text))) > most:
        text = text[: len(text) * most // size]
    return text


def signal_of(exit_code: int) -> str:
    """Return the signal in an exit code, ``SIGKILL`` for 137, or an empty text without one."""
    try:
        return signal.Signals(exit_code - SIGNALED).name if exit_code > SIGNALED else ""
    except ValueError:
        return ""


def words_of(end: TaskEnd) -> str:
    """Return the text that Skep adds to Docker's error about an ended task, or an empty text."""
    match end.cause:
        case EndCause.OUT_OF_MEMORY.value:
            return "out of memory"
        case EndCause.STOP_TIMEOUT.value:
            return f"killed: it did not end within {end.grace / 1e9:g} s of its stop signal"
        case EndCause.UNHEALTHY.value if end.health_output.strip():
            return f"last health check: {on_one_line(end.health_output)}"
        case EndCause.NODE_RESTARTED.value:
            return "its node restarted"
        case EndCause.MONITOR_LOST.value:
            return "its container monitor was killed"
        case _:
            return ""


def check_result(exit_code: int, output: str) -> str:
    """Return the result of a health check in words.  ``output``: on one line, and shown unchanged."""
    return f"exit {exit_code}, " + (f'output "{output}"' if output else "no output")


def on_one_line(text: str) -> str:
    """Return the start of ``text`` for one line of a terminal, without control characters."""
    return printable(" ".join(SEQUENCE.sub("", text).split()))[:_SHOWN_CHARACTERS_MAX]


def printable(text: str) -> str:
    """Return ``text`` without control characters; a tab becomes a space."""
    return "".join(
        char for char in text.replace("\t", " ") if char.isprintable() or char == "\N{REPLACEMENT CHARACTER}"
    )
