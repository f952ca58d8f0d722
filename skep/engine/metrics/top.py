"""``docker top``: the processes of one container, as the node's ``ps`` lists them.

Source: moby, daemon/top_unix.go (validatePSArgs, psPidsArg, parsePSOutput).
"""

import asyncio
import os
import re
import shlex
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from skep.engine.containers.container import Top
from skep.errors import InvalidArgument, Unavailable
from skep.linux.commands import communicate

_DEADLINE_S = 10.0
"""Time limit in seconds for one call of ps."""
_COLUMNS = "100000"
"""Line width for ps in characters.  Without it, some versions cut lines at the width of the daemon's terminal."""
_RENAMED_COLUMN = re.compile(r"\s+(\S*)=\s*(PID\S*)")
_PIDS_MAX = 10_000
"""Limit for the processes in one call of ps, because the kernel does not accept an argument of 128 KiB."""


async def processes(pids: AbstractSet[int], ps_args: str, pids_max: int = _PIDS_MAX) -> Top:
    """Return the rows of ``pids`` in the output of ``ps`` with the user's arguments.

    Raises: InvalidArgument: ps rejects the arguments, or its output has no column PID; Unavailable.
    """
    for name, title in _RENAMED_COLUMN.findall(ps_args):
        if name != "pid":  # another column with the title PID would break the selection of rows
            raise InvalidArgument(f'specifying "{name}={title}" is not allowed')
    try:
        arguments = shlex.split(ps_args)
    except ValueError as error:
        raise InvalidArgument(f"Error running ps: {error}") from error
    ordered = sorted(pids)
    begins = range(0, max(len(ordered), 1), pids_max)
    tops = [await _list(arguments, ordered[begin : begin + pids_max]) for begin in begins]
    return Top(tops[0].titles, tuple(row for top in tops for row in top.processes))


async def _list(arguments: Sequence[str], pids: Sequence[int]) -> Top:
    # ps -q reads no other process, so every row belongs to the container, whatever the format shows as PID.
    output, problem = await _run(*arguments, f"-q{','.join(map(str, pids))}")
    if problem:  # retry without -q, because some arguments (f, --sort, -p) conflict with it
        output, problem = await _run(*arguments)
    if problem:
        raise InvalidArgument(f"ps: {problem}")
    return parse(output, frozenset(pids))


async def _run(*arguments: str) -> tuple[str, str]:
    """Return the output of ps and its error.  The error is empty on success, and if no process matches.

    Raises: Unavailable.
    """
    process = await asyncio.create_subprocess_exec(
        "ps",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": _COLUMNS},
    )
    try:
        output, errors = await communicate(process, _DEADLINE_S)
    except TimeoutError as error:
        raise Unavailable(f"ps did not end within {_DEADLINE_S:g} s") from error
    problem = ""
    if process.returncode and (errors or process.returncode != 1):
        problem, *_ = errors.decode(errors="replace").splitlines() or [f"exit status {process.returncode}"]
    return output.decode(errors="replace"), problem


def parse(output: str, pids: AbstractSet[int]) -> Top:
    """Return the rows of ``ps`` output whose PID is in ``pids``.  Raises: InvalidArgument: PID column missing."""
    lines = output.splitlines()
    titles = tuple(lines[0].split()) if lines else ()
    if "PID" not in titles:
        raise InvalidArgument("Couldn't find PID field in ps output")
    column = titles.index("PID")
    rows = []
    for line in lines[1:]:
        # The last column is the command, which contains blanks.
        words = line.split(None, len(titles) - 1)
        if len(words) > column and words[column].isdigit() and int(words[column]) in pids:
            rows.append(tuple(words))
    return Top(titles, tuple(rows))
