"""Runs the administrator's program that writes DNS records for challenges (DNS-01).

It is run without a shell, as ``PROGRAM set NAME VALUE`` and ``PROGRAM remove NAME VALUE`` for a TXT record.  ``set``
may be repeated, and ends when the zone's name servers have the record.
"""

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import structlog

from skep.aio.race import unless_done
from skep.model.history import cut
from skep.model.task_end import on_one_line
from skep.paths import why_open_to_others

log = structlog.get_logger(__name__)

HOOK_S = 300.0
"""Time limit in seconds for a run.  Changes reach all servers of a zone within a few minutes."""
_OUTPUT_BYTES_MAX = 64 * 1024
"""Longest output that is read.  Programs print a few lines."""
_REASON_CHARACTERS_MAX = 200
"""Longest part of it in a reason.  With the program's path, the reason still fits a notification."""
_END_S = 1.0
"""Seconds for the end of a killed program."""
_ENVIRONMENT = ("PATH", "HOME", "LANG")


class DnsHook:
    """The program at an absolute path.  With an empty one, every run fails."""

    def __init__(self, path: str = "", deadline_s: float = HOOK_S) -> None:
        self._path = path
        self._deadline_s = deadline_s
        self._is_set: frozenset[tuple[str, str]] = frozenset()
        """Records that this process has written for the last order."""
        self._order = ""

    def __bool__(self) -> bool:
        return bool(self._path)

    async def set(self, records: Mapping[str, str], order: str) -> str:
        """Write the records of an order, unless this process has written them for it.

        Another order may have the same records, and another leader may have removed them in between.

        Args:
            order: What identifies the order.

        Returns the reason of a failure, or an empty text.
        """
        if order != self._order:
            self._order, self._is_set = order, frozenset()
        for record in sorted(set(records.items()) - self._is_set):
            if problem := await self._run("set", *record):
                return problem
            self._is_set |= {record}
        return ""

    async def remove(self, records: Mapping[str, str]) -> None:
        """Remove records.  A failure is only logged, because the record is useless but harmless."""
        self._is_set -= records.items()
        for name, value in records.items():
            if problem := await self._run("remove", name, value):
                log.warning("record of a challenge not removed", name=name, reason=problem)

    async def _run(self, action: Literal["set", "remove"], name: str, value: str) -> str:
        if not self._path:
            return "acme-dns-hook is not set on this manager. Set it on every manager"
        try:
            if why := why_open_to_others(Path(self._path)):
                return f"{self._path} is not run, because {why}"
            process = await asyncio.create_subprocess_exec(
                *(self._path, action, name, value),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                cwd="/",
                env={one: os.environ[one] for one in _ENVIRONMENT if one in os.environ},
                start_new_session=True,  # so that its child processes are killed with it
            )
        except OSError as error:
            return f"{self._path} cannot be run: {(error.strerror or str(error)).lower()}"
        try:
            async with unless_done(partial(_end, process)), asyncio.timeout(self._deadline_s):
                output = await _output(process)
                status = await process.wait()
        except TimeoutError:
            return f"{self._path} {action} did not end within {self._deadline_s:g} s"
        if status == 0:
            return ""
        text = cut(on_one_line(output.decode(errors="replace")), _REASON_CHARACTERS_MAX)
        return f"{self._path} {action} failed with exit code {status}: {text}"


async def _output(process: asyncio.subprocess.Process) -> bytes:
    """Return the beginning of the output.  The rest is read as well, so that the program can end."""
    assert process.stdout is not None, "it is a pipe"
    found = bytearray()
    while part := await process.stdout.read(_OUTPUT_BYTES_MAX):
        found += part[: _OUTPUT_BYTES_MAX - len(found)]
    return bytes(found)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the program with its child processes, which may hold its output open."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):  # a process that left the session may hold the output open
        async with asyncio.timeout(_END_S):
            await _output(process)  # asyncio reports the end of the process only after that
            await process.wait()
