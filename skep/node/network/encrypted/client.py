"""Asks the forwarder process: one kept connection, opened again when the process was replaced."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, Unavailable
from skep.node.network.encrypted.forwarder import Status
from skep.node.network.encrypted.plan import Plan
from skep.node.network.encrypted.protocol import (
    Apply,
    Ask,
    Now,
    Refused,
    Request,
    decode_answer,
    frame,
    read_frame,
)

DEADLINE_S = 10.0


class ForwarderClient:
    """The node process's end.  While the forwarder restarts a call waits; after 10 s it raises ``Unavailable``."""

    def __init__(self, path: Path, clock: Clock, chance: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._chance = chance
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def apply(self, plan: Plan) -> Status:
        """Have ``plan`` done; devices that could be made exist when this returns.

        Raises: FailedPrecondition: the address or port cannot be had; Unavailable.
        """
        return await self._ask(Apply(plan))

    async def status(self) -> Status:
        """How it stands.  Raises: Unavailable."""
        return await self._ask(Ask())

    def close(self) -> None:
        """Drop the connection; the next call opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _ask(self, request: Request) -> Status:
        message = frame(request)
        backoff = Backoff(0.02, 0.5, chance=self._chance)
        try:
            async with asyncio.timeout(DEADLINE_S), self._turn:
                while True:
                    try:
                        return await self._exchange(message)
                    except OSError:
                        self.close()
                        await backoff.sleep(self._clock)
                    except FailedPrecondition:
                        raise
                    except BaseException:
                        self.close()  # an answer may still be under way: this connection is of no more use
                        raise
        except TimeoutError as error:
            raise Unavailable(f"the forwarder does not answer on {self._path}") from error

    async def _exchange(self, message: bytes) -> Status:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path)
        reader, writer = self._streams
        writer.write(message)
        await writer.drain()
        body = await read_frame(reader)
        if body is None:
            raise ConnectionResetError("closed before it answered")
        match decode_answer(body):
            case Now(status):
                return status
            case Refused(sentence):
                raise FailedPrecondition(sentence)
