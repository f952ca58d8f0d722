"""The client of the net process: one kept connection, opened again when the process was replaced."""

import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from skep.aio.clock import Clock
from skep.dataplane.ipc import IpcClient
from skep.dataplane.ports import AddressNotHere
from skep.dataplane.protocol import (
    FRAME_BYTES_MAX,
    Done,
    Forget,
    List,
    Listing,
    Named,
    Refresh,
    Refused,
    Release,
    Request,
    Reserve,
    Reserved,
    Response,
    Serve,
    decode_response,
)
from skep.errors import AlreadyExists, FailedPrecondition, Unavailable
from skep.model.ids import NetworkId

MESH = "mesh"
"""Owner of the routing mesh's ports."""


class NetClient:
    """Ports that outlive the node process (``ports.PortReservations``), and names.

    While the net process restarts a call waits; after 10 s it raises ``Unavailable``.  ``owner``: of the ports that are
    reserved; each owner sees its own only.
    """

    def __init__(self, path: Path, clock: Clock, rng: Callable[[], float], owner: str = "") -> None:
        self._owner = owner
        self._ipc = IpcClient(path, clock, rng, server="the net process", bytes_max=FRAME_BYTES_MAX)

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        """Hold ``port`` (0: any free one) of ``address`` (empty: of all IPv4 addresses) and give it.

        ``target``: the address and port to which what comes there is relayed.
        Raises: AlreadyExists: another program has it; AddressNotHere; FailedPrecondition: it cannot be bound here;
        Unavailable.
        """
        token = f"{self._owner}:{secrets.token_hex(8)}"
        match await self._ask(Reserve(protocol, port, token, address, target)):
            case Reserved(held):
                return held
            case Refused(message, is_taken, is_elsewhere):
                if is_taken:
                    raise AlreadyExists(message)
                raise AddressNotHere(message) if is_elsewhere else FailedPrecondition(message)
            case other:
                raise _unexpected(other)

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        """Let ``port`` go; ignored when it is not held.  Raises: Unavailable."""
        response = await self._ask(Release(protocol, port, address))
        if not isinstance(response, Done):
            raise _unexpected(response)

    async def held(self) -> Iterable[tuple[str, int, str]]:
        """What is held for this owner: (protocol, port, address).  Raises: Unavailable."""
        return tuple(
            (held.protocol, held.port, held.address)
            for held in (await self.listing()).reservations
            if held.owner == self._owner
        )

    async def listing(self) -> Listing:
        """Everything it holds and serves.  Raises: Unavailable."""
        response = await self._ask(List())
        if not isinstance(response, Listing):
            raise _unexpected(response)
        return response

    async def serve(self, named: Named) -> None:
        """Serve names and virtual addresses in a container's namespace, in place of those it had.

        Returns when queries are answered.  Raises: FailedPrecondition: they cannot be served there; Unavailable.
        """
        match await self._ask(Serve(named)):
            case Done():
                return
            case Refused(message):
                raise FailedPrecondition(message)
            case other:
                raise _unexpected(other)

    async def forget(self, id: str) -> None:
        """Serve none to container ``id`` any more; harmless when it has none.  Raises: Unavailable."""
        response = await self._ask(Forget(id))
        if not isinstance(response, Done):
            raise _unexpected(response)

    async def refresh(self, networks: Iterable[NetworkId] = ()) -> None:
        """The tables of ``networks`` (none: all) have changed; returns when they are applied in every namespace.

        Raises: Unavailable: in some namespace they are not; the net process tries again by itself.
        """
        match await self._ask(Refresh(tuple(networks))):
            case Done():
                return
            case Refused(message):
                raise Unavailable(message)
            case other:
                raise _unexpected(other)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        self._ipc.close()

    async def _ask(self, request: Request) -> Response:
        return decode_response(await self._ipc.ask(msgspec.msgpack.encode(request)))


def _unexpected(response: Response) -> Unavailable:
    return Unavailable(f"the net process answered {type(response).__name__}, which was not asked for")
