"""Runs a process with simulated agents, which reads commands from its standard input and responds to each with a
number.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias

Ask: TypeAlias = Callable[[str], Awaitable[float]]
"""Sends a command to the process and returns its number, usually the command's duration in seconds."""


@asynccontextmanager
async def crowd(module: str, *arguments: str) -> AsyncIterator[Ask]:
    """Run ``module`` in a process while the context is open.  The block begins when the process is ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def ask(word: str) -> float:
        stdin.write(f"{word}\n".encode())
        if not (line := await stdout.readline()):
            raise ConnectionError("the agents have ended: what they said is above")
        return float(line)

    try:
        if not await stdout.readline():
            raise ConnectionError("the agents did not come up: what they said is above")
        yield ask
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
