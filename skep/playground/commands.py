"""Runs the system's commands (ip, mount, nsenter) with a deadline, and waits for conditions."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from skep.aio.groups import first_alone
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.linux.commands import communicate

_POLL_S = 0.02
"""Seconds between two checks of a condition."""
RERUN = "rerun the command"
"""The usual step after a condition has not come true."""


def find(command: str, *others: str) -> str:
    """Return the path of a command or of the first of ``others``, which may also be in /usr/sbin.

    Raises: FailedPrecondition: none of them is installed.
    """
    places = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
    for one in (command, *others):
        if path := shutil.which(one, path=places):
            return path
    raise FailedPrecondition(
        f"The command {command} is not installed. Run make setup, or install its package."
    )


async def run(*argv: str, stdin: bytes = b"", deadline_s: float = 30) -> bytes:
    """Run a command and return its standard output.

    Raises: FailedPrecondition: it failed (the message has its output); Unavailable: it took longer than ``deadline_s``.
    """
    process = await asyncio.create_subprocess_exec(
        find(argv[0]),
        *argv[1:],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "LC_ALL": "C",
        },  # the output is parsed here, so it must not depend on the user's language
    )
    try:
        output, errors = await communicate(process, deadline_s, stdin)
    except TimeoutError as error:
        raise Unavailable(f"did not finish within {deadline_s:g} s: {' '.join(argv)}") from error
    if process.returncode:
        message = errors.decode(errors="replace").strip()
        raise FailedPrecondition(f"{' '.join(argv)}: {message or f'exit code {process.returncode}'}")
    return output


async def wait_until(
    condition: Callable[[], Awaitable[bool]], what: str, within_s: float, then: str = RERUN
) -> None:
    """Poll until ``condition`` returns True.

    Args:
        what: The condition as a sentence without a full stop, for the error.
        then: The step after a look at the nodes, in the imperative, for the error.

    Raises: Unavailable: it did not return True within ``within_s`` seconds.
    """
    try:
        async with asyncio.timeout(within_s):
            while not await condition():  # noqa: ASYNC110 - what is waited for lies in other processes
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise Unavailable(
            f"This did not happen in time ({within_s:g} s): {what}. "
            f"Run skep playground ps to see which nodes respond, then {then}."
        ) from error


async def together(*steps: Coroutine[Any, Any, object]) -> None:
    """Run steps concurrently.  The first SkepError cancels the other steps and is raised by itself, without a group."""
    with first_alone(SkepError):
        async with asyncio.TaskGroup() as group:
            for step in steps:
                group.create_task(step)
