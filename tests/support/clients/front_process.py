"""A front, or a manager behind it, in its own process that a test can kill, stop or starve.

    python -m tests.support.clients.front_process {front|manager} DIRECTORY [DESCRIPTORS]

The manager responds to ``/nodes`` with its pid, never to ``/tasks/hang``, and to ``/tasks/begin`` with an incomplete
response.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from tests.support.clients.front_rig import Rig


async def _answer(request: web.Request) -> web.StreamResponse:
    await request.read()
    if request.path.endswith("/hang"):
        await asyncio.Event().wait()
    if request.path.endswith("/begin"):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        await asyncio.Event().wait()
    return web.json_response({"pid": os.getpid()})


async def _run(role: str, directory: Path) -> None:
    rig = Rig(directory)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with rig.front() if role == "front" else rig.manager(_answer):
        print("ready", flush=True)
        await stopped.wait()


@asynccontextmanager
async def process(
    role: str, directory: Path, descriptors: int = 0
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a process in that role, and wait until it is ready.  It is killed at the end if it still runs."""
    arguments = [sys.executable, "-m", __name__, role, str(directory), str(descriptors)]
    child = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert child.stdout is not None
        while (line := await child.stdout.readline()) != b"ready\n":
            assert line, "the process has ended"
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


if __name__ == "__main__":
    _, role, directory, descriptors = sys.argv
    if int(descriptors):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(descriptors), int(descriptors)))
    asyncio.run(_run(role, Path(directory)))
