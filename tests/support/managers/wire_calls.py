"""Makes every call of the protocol with an empty request, to test which role may make it."""

import asyncio
from collections.abc import Mapping

from skep.errors import SkepError
from skep.rpc.headers import request_block
from skep.wire import methods
from skep.wire.client import ManagerChannel
from skep.wire.methods import (
    A,
    BothStream,
    ClientStreaming,
    Method,
    MethodAccess,
    Q,
    ServerStreaming,
    UnaryMethod,
)

METHODS = {
    name: method
    for name, method in sorted(vars(methods).items())
    if isinstance(method, UnaryMethod | ServerStreaming | ClientStreaming | BothStream)
}
"""Methods by the name of their constant in ``wire.methods``."""

GUARDED = {name: method for name, method in METHODS.items() if method.access is not MethodAccess.OPEN}
"""Methods that require a certificate."""

PATIENCE_S = 3.0


async def call(
    channel: ManagerChannel, name: str, metadata: Mapping[str, str] | None = None
) -> SkepError | None:
    """Call a method with an empty request.  Return the error, or None for a response (or a stream that stays open)."""
    method = METHODS[name]
    if metadata is not None:
        channel = _Forging(channel, metadata)
    try:
        if isinstance(method, UnaryMethod):
            await channel.call(method, method.request())
            return None
        async with channel.stream(method) as stream, asyncio.timeout(PATIENCE_S):
            is_only = isinstance(method, ServerStreaming)
            await stream.send(method.request(), end=is_only)
            await stream.receive()
    except SkepError as error:
        return error
    except TimeoutError:
        return None
    return None


class _Forging(ManagerChannel):
    """A channel that adds ``metadata`` to each call."""

    def __init__(self, channel: ManagerChannel, metadata: Mapping[str, str]) -> None:
        super().__init__(channel.address, channel._connection, channel._name, channel.peer)
        self._metadata = tuple(metadata.items())

    def _block(self, method: Method[Q, A]) -> bytes:
        return request_block(method.path, None, self._metadata, scheme="https", authority=self._name)
