"""Which processes ``docker top`` shows, with the ``ps`` of this machine."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from skep.engine.metrics import top
from skep.errors import InvalidArgument


class Processes:
    """``own`` are a container's; ``foreign`` is another one, and a child of one of them."""

    def __init__(self, first: asyncio.subprocess.Process, foreign: asyncio.subprocess.Process) -> None:
        self.own = frozenset((os.getpid(), first.pid))
        self.first = first.pid
        self.foreign = foreign.pid

    async def shown(self, arguments: str) -> set[int]:
        """Which of the two are in the output."""
        listed = await top.processes(self.own, arguments)
        assert "PID" in listed.titles
        lines = [" ".join(row) for row in listed.processes]
        found = {self.first: "sleep 1001", self.foreign: f"sleep {self.first}"}
        return {pid for pid, words in found.items() if any(words in line for line in lines)}


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    first = await asyncio.create_subprocess_exec("sleep", "1001")
    foreign = await asyncio.create_subprocess_exec("sleep", str(first.pid))
    try:
        yield Processes(first, foreign)
    finally:
        for one in (first, foreign):
            one.kill()
            await one.wait()


@pytest.mark.parametrize(
    "arguments",
    [
        *("-ef", "aux", "-aux", "-eo pid,args", "-o pid,args", "axo pid,args", "-efL", "-eo pid=PID,args"),
        *("axf", "-ef --forest", "-efH", "aux --sort=-pid", "-eo pid,args --sort pid"),  # -q is not for these
    ],
)
async def test_the_processes_of_a_container_are_shown(processes: Processes, arguments: str) -> None:
    assert processes.first in await processes.shown(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            "-eoppid=PID -oargs",
            "-e -o ppid='PID' -o args",
            "oppid=PID -e -o args",
            "--format=ppid=PID,args",
        ),
        "-eo args,pid,comm",  # a command line has blanks: a word of it is at the place of PID
    ],
)
async def test_no_format_shows_processes_of_others(processes: Processes, arguments: str) -> None:
    assert processes.foreign not in await processes.shown(arguments)


async def test_a_container_with_more_processes_than_one_ps_is_asked_for_has_all_its_rows(
    processes: Processes,
) -> None:
    listed = await top.processes(processes.own, "-eo pid,args", pids_max=1)
    assert {int(row[0]) for row in listed.processes} == processes.own


async def test_processes_that_have_ended_are_no_error(processes: Processes) -> None:
    ended = await asyncio.create_subprocess_exec("true")
    await ended.wait()
    for pids in (frozenset((ended.pid,)), frozenset[int]()):
        listed = await top.processes(pids, "-eo args,pid")
        assert (listed.titles, listed.processes) == (("COMMAND", "PID"), ())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-eo pid,nothing", "ps: error: unknown user-defined format specifier"),
        ("-eo comm", "Couldn't find PID field in ps output"),
        ("-eo 'pid", "Error running ps"),
        ("-e -o rss=PID", 'specifying "rss=PID" is not allowed'),
    ],
)
async def test_what_ps_does_not_take_is_refused(processes: Processes, arguments: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        await processes.shown(arguments)
