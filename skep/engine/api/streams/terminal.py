"""Joins a client's connection and a process's standard streams in both directions."""

import asyncio
from collections.abc import Collection
from enum import Enum
from typing import Protocol

from skep.api.http.server import OutputStream
from skep.engine.api.streams.detach import DetachKeys
from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import StandardStream

ALL_STREAMS = frozenset(StandardStream)


class TerminalClient(Protocol):
    """A client's end of the connection."""

    async def read(self) -> bytes:
        """Return the next input, or b"" after its end.  Raises: ConnectionError."""

    async def send(self, stream: OutputStream, data: bytes) -> None:
        """Send output.  Raises: ConnectionError: the client has disconnected, or reads nothing."""


class SessionEnd(Enum):
    """Reason why a session ended."""

    OUTPUT = "the process's output ended"
    DETACHED = "the client pressed its detach keys"
    GONE = "the client disconnected, or takes nothing"


async def join(
    client: TerminalClient,
    process: Attachment,
    *,
    takes_input: bool,
    streams: Collection[StandardStream] = ALL_STREAMS,
    keys: DetachKeys | None = None,
) -> SessionEnd:
    """Pass bytes until the process's output ends, the client disconnects, or presses ``keys``.

    When the client's input ends, that is passed on, and the output continues.
    """
    async with asyncio.TaskGroup() as group:
        output = group.create_task(_pass_output(process, client, streams), name="output")
        inbound = group.create_task(
            _pass_input(client, process, keys) if takes_input else _wait_gone(client), name="input"
        )
        await asyncio.wait((output, inbound), return_when=asyncio.FIRST_COMPLETED)
        if inbound.done() and not inbound.result():
            await asyncio.wait((output,))  # only the input has ended, so wait for the output
        end = SessionEnd.GONE
        if output.done():
            end = SessionEnd.OUTPUT if output.result() else SessionEnd.GONE
        elif inbound.done() and inbound.result():
            end = SessionEnd.DETACHED
        output.cancel()
        inbound.cancel()
    return end


async def _pass_output(
    process: Attachment, client: TerminalClient, streams: Collection[StandardStream]
) -> bool:
    """Return True when the process has ended its output, False when the client has disconnected."""
    while (piece := await process.read()) is not None:
        stream, data = piece
        if stream in streams:
            try:
                await client.send(OutputStream(stream.value), data)
            except ConnectionError:
                return False
    return True


async def _pass_input(client: TerminalClient, process: Attachment, keys: DetachKeys | None) -> bool:
    """Pass input until it ends.  Return whether the client pressed the detach keys."""
    try:
        while data := await client.read():
            has_detached = False
            if keys is not None:
                data, has_detached = keys.pass_on(data)
            await process.write(data)
            if has_detached:
                return True
        process.close_input()
    except ConnectionError:
        pass  # one side has disconnected, which the output notices and then ends the session
    return False


async def _wait_gone(client: TerminalClient) -> bool:
    """Discard input until the client disconnects.  A half-close does not end the output."""
    try:
        while await client.read():
            pass
    except ConnectionError:
        pass
    return False
