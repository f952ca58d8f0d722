"""Commands in containers with a time limit: health checks, and commands that read a queue's length.

A slow command is killed before the container's next one begins, so commands never pile up.
"""

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final

from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import ExecConfig, StandardStream
from skep.engine.containers.execs import KILLED_S, Execs
from skep.errors import NotFound, Unavailable
from skep.model.values.ids import ContainerId

OUTPUT_BYTES_MAX: Final = 4096
"""Number of bytes that are kept of a command's output."""


class LimitedExecs:
    """Runs one command at a time in each container."""

    def __init__(self, execs: Execs, what: str, killed_s: float = KILLED_S) -> None:
        """
        Args:
            what: Name of such a command in errors.
            killed_s: Seconds to wait for the end of a killed command.
        """
        self._execs = execs
        self._what = what
        self._killed_s = killed_s
        self._left: dict[ContainerId, str] = {}
        """Commands that were killed but have not ended yet.  The container's next one waits for them."""

    async def run(
        self,
        id: ContainerId,
        command: Sequence[str],
        seconds: float,
        output: bytearray,
        streams: Collection[StandardStream] = tuple(StandardStream),
    ) -> int:
        """Run a command and return its exit code.

        Args:
            output: Gets the beginning of the output, also if the command fails.
            streams: Streams whose output is kept.

        Raises:
            TimeoutError: It took longer than ``seconds``, and was killed.
            SkepError, OSError: It could not run.
        """
        await self._wait_left(id, seconds)
        exec_id = self._execs.create(id, ExecConfig(command=tuple(command)))
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(None) as deadline:
                # The time limit starts with the exec, because waiting for other execs says nothing about this
                # container.
                attachment = await self._execs.start(
                    exec_id, on_begin=lambda: deadline.reschedule(now() + seconds)
                )
                try:
                    await _collect(attachment, output, streams)
                finally:
                    attachment.close()
                return (await self._execs.wait(exec_id)).exit_code or 0
        finally:
            await self._end(id, exec_id)

    def forget(self, id: ContainerId) -> None:
        """Forget a container that has ended: an unfinished command ends with it."""
        self._left.pop(id, None)

    async def _end(self, id: ContainerId, exec_id: str) -> None:
        """Kill a command that still runs or starts.  Return when it has ended or takes too long to wait for."""
        try:
            if self._execs.get(exec_id).running:
                self._left[id] = exec_id
                self._execs.kill(exec_id)  # a starting one is killed once it has started
                async with asyncio.timeout(self._killed_s):
                    await self._execs.wait(exec_id)
        except TimeoutError:
            return  # its result still counts
        except NotFound:  # removed with its container; raising would hide the caller's cancellation
            pass
        self._left.pop(id, None)
        self._execs.drop(exec_id)

    async def _wait_left(self, id: ContainerId, seconds: float) -> None:
        """Wait for an unfinished earlier command.  Raises: Unavailable: it has not ended."""
        left = self._left.get(id)
        if left is None:
            return
        with suppress(NotFound):
            try:
                async with asyncio.timeout(seconds):
                    await self._execs.wait(left)
            except TimeoutError as error:
                raise Unavailable(f"the previous {self._what} was killed but has not ended") from error
        self._left.pop(id, None)
        self._execs.drop(left)


async def _collect(attachment: Attachment, output: bytearray, streams: Collection[StandardStream]) -> None:
    """Read the output to its end.  Append up to ``OUTPUT_BYTES_MAX`` to ``output``, and three dots if more was read.

    Source: moby, daemon/health.go (limitedBuffer).
    """
    is_cut = False
    try:
        while (piece := await attachment.read()) is not None:
            if piece[0] not in streams:
                continue
            left = OUTPUT_BYTES_MAX - len(output)
            output += piece[1][:left]
            is_cut = is_cut or len(piece[1]) > left
    finally:
        if is_cut:
            output += b"..."
