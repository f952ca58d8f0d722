"""Runs commands with a deadline.  A command never outlives its caller."""

import asyncio


async def communicate(
    process: asyncio.subprocess.Process, deadline_s: float, stdin: bytes | None = None
) -> tuple[bytes, bytes]:
    """Return the stdout and stderr of ``process``.  When this returns or raises, the process has ended.

    Raises: TimeoutError: it took longer than ``deadline_s`` and was killed.
    """
    try:
        async with asyncio.timeout(deadline_s):
            output, errors = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output or b"", errors or b""
