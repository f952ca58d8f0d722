"""Port reservations held by this process instead of the net process."""

import socket
from collections.abc import Iterable

from skep.dataplane.net_process.protocol import Reservation
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.ports import bind


class OwnReservations:
    """Reservations of this process in the node's own namespace.  They end with the process."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._sockets: dict[tuple[str, int, str], socket.socket] = {}

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        opened = await self._namespaces.run(self._namespaces.home, bind, protocol, port, address)
        chosen: int = opened.getsockname()[1]
        self._sockets[protocol, chosen, address] = opened
        return chosen

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        opened = self._sockets.pop((protocol, port, address), None)
        if opened is not None:
            opened.close()

    async def list_held(self) -> Iterable[tuple[str, int, str]]:
        return tuple(self._sockets)

    def sockets(self) -> list[tuple[Reservation, socket.socket]]:
        """Return the reservations with their sockets."""
        return [
            (Reservation(protocol, port, address=address), opened)
            for (protocol, port, address), opened in self._sockets.items()
        ]

    def close(self) -> None:
        """Release all reservations."""
        for opened in self._sockets.values():
            opened.close()
        self._sockets.clear()
