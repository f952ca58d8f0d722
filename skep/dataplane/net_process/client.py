"""The client of the net process.  It keeps one connection and reconnects when the process was replaced."""

import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from skep.aio.clock import Clock
from skep.dataplane.net_process.ipc import IpcClient
from skep.dataplane.net_process.protocol import (
    FRAME_BYTES_MAX,
    Done,
    ForgetContainer,
    List,
    Named,
    Refresh,
    ReleasePort,
    Request,
    RequestRefused,
    Reserve,
    Reserved,
    Response,
    Serve,
    ServedListing,
    decode_response,
)
from skep.dataplane.ports import AddressNotHere
from skep.errors import AlreadyExists, FailedPrecondition, Unavailable
from skep.model.values.ids import NetworkId

MESH = "mesh"
"""Owner label of ports that the routing mesh reserves."""


class NetClient:
    """Reserves ports that outlive the node process (``ports.PortReservations``) and registers names.

    If the net process restarts, a call waits for it, and raises ``Unavailable`` after 10 s.  ``owner`` labels the ports
    that this client reserves, and ``list_held`` returns only ports with this label.
    """

    def __init__(self, path: Path, clock: Clock, rng: Callable[[], float], owner: str = "") -> None:
        self._owner = owner
        self._ipc = IpcClient(path, clock, rng, server="the net process", bytes_max=FRAME_BYTES_MAX)

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        """Reserve a port and return its number.

        Args:
            port: The port, or 0 for any free port.
            address: The address to bind, or empty for every IPv4 address.
            target: The address and port to which the net process relays traffic, or None if the kernel forwards it.

        Raises:
            AlreadyExists: Another program has the port.
            AddressNotHere: The node does not have the address.
            FailedPrecondition: The port cannot be bound on this node.
            Unavailable: The net process does not answer.
        """
        token = f"{self._owner}:{secrets.token_hex(8)}"
        match await self._ask(Reserve(protocol, port, token, address, target)):
            case Reserved(held):
                return held
            case RequestRefused(message, is_taken, is_elsewhere):
                if is_taken:
                    raise AlreadyExists(message)
                raise AddressNotHere(message) if is_elsewhere else FailedPrecondition(message)
            case other:
                raise _unexpected(other)

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        """Release ``port``.  Does nothing if it is not held for this owner.  Raises: Unavailable."""
        response = await self._ask(ReleasePort(protocol, port, address, self._owner))
        if not isinstance(response, Done):
            raise _unexpected(response)

    async def list_held(self) -> Iterable[tuple[str, int, str]]:
        """Return the protocol, port and address of each port held for this owner.  Raises: Unavailable."""
        return tuple(
            (held.protocol, held.port, held.address)
            for held in (await self.listing()).reservations
            if held.owner == self._owner
        )

    async def listing(self) -> ServedListing:
        """Return the ports and containers that the net process holds and serves.  Raises: Unavailable."""
        response = await self._ask(List())
        if not isinstance(response, ServedListing):
            raise _unexpected(response)
        return response

    async def serve(self, named: Named) -> None:
        """Serve names and virtual addresses in a container's namespace, in place of earlier ones.

        Returns once queries are answered.  Raises: FailedPrecondition: the namespace cannot be served; Unavailable.
        """
        match await self._ask(Serve(named)):
            case Done():
                return
            case RequestRefused(message):
                raise FailedPrecondition(message)
            case other:
                raise _unexpected(other)

    async def forget(self, id: str) -> None:
        """Stop serving container ``id``.  Does nothing if it is not served.  Raises: Unavailable."""
        response = await self._ask(ForgetContainer(id))
        if not isinstance(response, Done):
            raise _unexpected(response)

    async def refresh(self, networks: Iterable[NetworkId] = ()) -> None:
        """Reload the tables of ``networks``, or of all networks if empty, and wait until every namespace has them.

        Raises: Unavailable: some namespace does not have them yet.  The net process retries by itself.
        """
        match await self._ask(Refresh(tuple(networks))):
            case Done():
                return
            case RequestRefused(message):
                raise Unavailable(message)
            case other:
                raise _unexpected(other)

    def close(self) -> None:
        """Close the connection.  The next call opens another."""
        self._ipc.close()

    async def _ask(self, request: Request) -> Response:
        return decode_response(await self._ipc.ask(msgspec.msgpack.encode(request)))


def _unexpected(response: Response) -> Unavailable:
    return Unavailable(f"the net process sent an unexpected response, {type(response).__name__}")
