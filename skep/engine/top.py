"""``docker top``: the processes of one container, as ``ps`` on the node lists them.

Source: moby, daemon/top_unix.go (validatePSArgs, psPidsArg, parsePSOutput).
"""

import asyncio
import os
import re
import shlex
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from skep.engine.container import Top
from skep.errors import InvalidArgument, Unavailable
from skep.linux.commands import communicate

_DEADLINE_S = 10.0
_COLUMNS = "100000"
"""How wide lines may be: some versions of ps cut them at the width of the terminal that the daemon was started from."""
_RENAMED_COLUMN = re.compile(r"\s+(\S*)=\s*(PID\S*)")
_PIDS_MAX = 10_000
"""Processes that one ps is asked for: the kernel takes no argument of 128 KiB."""


async def processes(pids: AbstractSet[int], ps_args: str) -> Top:
    """The rows of ``pids`` in the output of ``ps`` with the user's arguments.

    Raises: InvalidArgument: ps refuses the arguments, or its output has no column PID; Unavailable.
    """
    for name, title in _RENAMED_COLUMN.findall(ps_args):
        if name != "pid":  # another column under the title by which rows are chosen
            raise InvalidArgument(f'specifying "{name}={title}" is not allowed')
    try:
        arguments = shlex.split(ps_args)
    except ValueError as error:
        raise InvalidArgument(f"Error running ps: {error}") from error
    ordered = sorted(pids)
    begins = range(0, max(len(ordered), 1), _PIDS_MAX)
    tops = [await _listed(arguments, ordered[begin : begin + _PIDS_MAX]) for begin in begins]
    return Top(tops[0].titles, tuple(row for top in tops for row in top.processes))


async def _listed(arguments: Sequence[str], pids: Sequence[int]) -> Top:
    # With -q ps reads no other process: whatever a format has at the place of PID, no row is a foreign one's.
    output, problem = await _run(*arguments, f"-q{','.join(map(str, pids))}")
    if problem:  # some arguments (f, --sort, -p) cannot be used together with it
        output, problem = await _run(*arguments)
    if problem:
        raise InvalidArgument(f"ps: {problem}")
    return parse(output, frozenset(pids))


async def _run(*arguments: str) -> tuple[str, str]:
    """The output of ps, and why it failed; empty: it did not, or has found no process.  Raises: Unavailable."""
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
        raise Unavailable(f"ps did not end in {_DEADLINE_S:g} s") from error
    problem = ""
    if process.returncode and (errors or process.returncode != 1):
        problem, *_ = errors.decode(errors="replace").splitlines() or [f"exit status {process.returncode}"]
    return output.decode(errors="replace"), problem


def parse(output: str, pids: AbstractSet[int]) -> Top:
    """Rows of ``ps`` output whose PID is in ``pids``.  Raises: InvalidArgument: there is no such column."""
    lines = output.splitlines()
    titles = tuple(lines[0].split()) if lines else ()
    if "PID" not in titles:
        raise InvalidArgument("Couldn't find PID field in ps output")
    column = titles.index("PID")
    rows = []
    for line in lines[1:]:
        # The last column is the command, which holds blanks.
        words = line.split(None, len(titles) - 1)
        if len(words) > column and words[column].isdigit() and int(words[column]) in pids:
            rows.append(tuple(words))
    return Top(titles, tuple(rows))
