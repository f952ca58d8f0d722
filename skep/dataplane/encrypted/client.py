"""Asks the forwarder process: one kept connection, opened again when the process was replaced."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from skep.aio.clock import Clock
from skep.dataplane.encrypted.forwarder import Status
from skep.dataplane.encrypted.plan import Plan
from skep.dataplane.encrypted.protocol import (
    FRAME_BYTES_MAX,
    Apply,
    Ask,
    Now,
    Refused,
    Request,
    decode_answer,
)
from skep.dataplane.ipc import IpcClient
from skep.errors import FailedPrecondition


class ForwarderClient:
    """The node process's end.  While the forwarder restarts a call waits; after 10 s it raises ``Unavailable``."""

    def __init__(self, path: Path, clock: Clock, chance: Callable[[], float]) -> None:
        self._ipc = IpcClient(path, clock, chance, whom="the forwarder", bytes_max=FRAME_BYTES_MAX)

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
        self._ipc.close()

    async def _ask(self, request: Request) -> Status:
        match decode_answer(await self._ipc.ask(msgspec.msgpack.encode(request))):
            case Now(status):
                return status
            case Refused(sentence):
                raise FailedPrecondition(sentence)
