"""``docker top``: the processes of one container, as ``ps`` on the node lists them.

Source: moby, daemon/top_unix.go (validatePSArgs, parsePSOutput).
"""

import asyncio
import os
import re
import shlex
from collections.abc import Set as AbstractSet

from skep.engine.container import Top
from skep.errors import InvalidArgument, Unavailable
from skep.linux.commands import communicate

_DEADLINE_S = 10.0
_COLUMNS = "100000"
"""How wide lines may be: some versions of ps cut them at the width of the terminal that the daemon was started from."""
_RENAMED_COLUMN = re.compile(r"\s+(\S*)=\s*(PID\S*)")


async def processes(pids: AbstractSet[int], ps_args: str) -> Top:
    """Run ``ps`` with the user's arguments and keep the rows of ``pids``.

    Raises: InvalidArgument: ps refuses the arguments, or its output has no column PID.
    """
    for name, title in _RENAMED_COLUMN.findall(ps_args):
        if name != "pid":  # another column under the title by which rows are chosen
            raise InvalidArgument(f'specifying "{name}={title}" is not allowed')
    try:
        arguments = shlex.split(ps_args)
    except ValueError as error:
        raise InvalidArgument(f"Error running ps: {error}") from error
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
    if process.returncode:
        reason, *_ = errors.decode(errors="replace").splitlines() or [f"exit status {process.returncode}"]
        raise InvalidArgument(f"ps: {reason}")
    return parse(output.decode(errors="replace"), pids)


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
