"""Runs commands with a deadline.  A command never outlives its caller."""

import asyncio
import os
import signal
from contextlib import suppress

_END_S = 1.0
"""Seconds to wait for the end of a killed session.  A child that left it may hold the output open for longer."""


async def communicate(
    process: asyncio.subprocess.Process,
    deadline_s: float,
    stdin: bytes | None = None,
    *,
    leads_session: bool = False,
) -> tuple[bytes, bytes]:
    """Return the stdout and stderr of ``process``.  The process has ended afterwards.

    Args:
        leads_session: Whether it was started with ``start_new_session``.  Then its child processes are killed at the
            end, also in the background.

    Raises: TimeoutError: it took longer than ``deadline_s`` and was killed.
    """
    try:
        async with asyncio.timeout(deadline_s):
            output, errors = await process.communicate(stdin)
    finally:
        if leads_session:
            await _end_session(process)
        elif process.returncode is None:
            process.kill()
            await process.wait()
    return output or b"", errors or b""


async def _end_session(leader: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            await leader.wait()
