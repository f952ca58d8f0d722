"""A client's connection and a process's standard streams, joined in both directions."""

import asyncio
from collections.abc import Collection

from skep.api.server import OutputStream
from skep.engine.api.detach import DetachKeys
from skep.engine.api.hijack import Duplex
from skep.engine.attachment import Attachment
from skep.engine.container import Stream

ALL_STREAMS = frozenset(Stream)


async def join(
    client: Duplex,
    process: Attachment,
    *,
    takes_input: bool,
    streams: Collection[Stream] = ALL_STREAMS,
    keys: DetachKeys | None = None,
) -> bool:
    """Pass bytes until the process's output ends, the client disconnects, or presses ``keys``.

    The end of the client's input is passed on and ends nothing else.

    Returns:
        Whether the process's output ended.
    """
    async with asyncio.TaskGroup() as group:
        output = group.create_task(_pass_output(process, client, streams), name="output")
        inbound = group.create_task(
            _pass_input(client, process, keys) if takes_input else _wait_gone(client), name="input"
        )
        await asyncio.wait((output, inbound), return_when=asyncio.FIRST_COMPLETED)
        if inbound.done() and not inbound.result():
            await asyncio.wait((output,))  # only the input has ended
        has_ended = output.done() and output.result()
        output.cancel()
        inbound.cancel()
    return has_ended


async def _pass_output(process: Attachment, client: Duplex, streams: Collection[Stream]) -> bool:
    """True when the process has ended its output, False when the client has gone."""
    while (piece := await process.read()) is not None:
        stream, data = piece
        if stream in streams:
            try:
                await client.send(OutputStream(stream.value), data)
            except ConnectionError:
                return False
    return True


async def _pass_input(client: Duplex, process: Attachment, keys: DetachKeys | None) -> bool:
    """Until the client's input ends; True if it pressed the keys."""
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
        pass  # one side has gone; the output notices and ends the session
    return False


async def _wait_gone(client: Duplex) -> bool:
    """Discard input; a half-close does not end the output."""
    try:
        while await client.read():
            pass
    except ConnectionError:
        pass
    return False
