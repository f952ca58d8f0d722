"""WireGuard devices: made, read and written.  What they should be is ``plan.py``'s matter.

Devices are made in the node's own namespace, where their UDP sockets stay, and moved to the tunnels' namespace, where
packets enter and leave them.  The kernel's are configured over generic netlink, wireguard-go's over its unix socket.

Sources: wireguard.com/xplatform (the protocol of the socket); linux, include/uapi/linux/wireguard.h;
wireguard.com/netns (the two namespaces).
"""

import asyncio
import socket
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic.wireguard import AsyncWireGuard

from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.plan.wireguard import KEEPALIVE_S, Change, FoundDevice, FoundPeer, Peer
from skep.errors import Unavailable

T = TypeVar("T")

SOCKETS = Path("/var/run/wireguard")
"""Where wireguard-go makes its sockets; it is built so."""
_ANSWER_S_MAX = 5.0
_NETLINK_GENERIC = 16
_ANSWER_BYTES_MAX = 1 << 24


class Devices(Protocol):
    """The WireGuard devices of one node, by name."""

    async def place(self, name: str, namespace: Path, mtu: int) -> int:
        """Have the device in ``namespace``; its index there, 0: it is not there yet.  Raises: Unavailable."""

    async def read(self, name: str, namespace: Path) -> FoundDevice:
        """How it is configured.  Raises: Unavailable."""

    async def write(self, name: str, namespace: Path, change: Change) -> None:
        """Change that.  Raises: Unavailable."""


class KernelDevices:
    """The kernel's."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    async def place(self, name: str, namespace: Path, mtu: int) -> int:
        try:
            if index := await self._namespaces.run(namespace, _index_of, name):
                return index
            async with self._namespaces.netlink(self._namespaces.home) as home:
                with namespace.open("rb") as target:
                    await home.link("add", ifname=name, kind="wireguard", mtu=mtu, net_ns_fd=target.fileno())
            return await self._namespaces.run(namespace, _index_of, name)
        except (OSError, NetlinkError) as error:
            raise Unavailable(f"the kernel makes no WireGuard device: {error}") from error

    async def read(self, name: str, namespace: Path) -> FoundDevice:
        return await self._through(namespace, lambda wireguard: _read_kernel(wireguard, name))

    async def write(self, name: str, namespace: Path, change: Change) -> None:
        async def send(wireguard: AsyncWireGuard) -> None:
            for message in kernel_messages(change):
                await wireguard.set(name, **message)

        await self._through(namespace, send)

    async def _through(self, namespace: Path, work: Callable[[AsyncWireGuard], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(_ANSWER_S_MAX):
                opened = await self._namespaces.run(namespace, _generic_socket)
                async with AsyncWireGuard(use_socket=opened) as wireguard:
                    return await work(wireguard)
        except (TimeoutError, OSError, NetlinkError) as error:
            raise Unavailable(f"the kernel's WireGuard does not answer: {error}") from error


class UserSpaceDevices:
    """wireguard-go's, whose processes are started and supervised elsewhere."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    async def place(self, name: str, namespace: Path, mtu: int) -> int:
        try:
            if index := await self._namespaces.run(namespace, _index_of, name):
                return index
            async with self._namespaces.netlink(self._namespaces.home) as home:
                await _move(home, name, namespace, mtu)
            return await self._namespaces.run(namespace, _index_of, name)
        except (OSError, NetlinkError) as error:
            raise Unavailable(f"the device {name} cannot be moved: {error}") from error

    async def read(self, name: str, namespace: Path) -> FoundDevice:
        return parsed_device(await self._answered(name, "get=1\n\n"))

    async def write(self, name: str, namespace: Path, change: Change) -> None:
        await self._answered(name, socket_message(change))

    async def _answered(self, name: str, request: str) -> str:
        """Raises: Unavailable: nobody serves the socket, or the request was refused."""
        try:
            async with asyncio.timeout(_ANSWER_S_MAX):
                path = str(SOCKETS / f"{name}.sock")
                reader, writer = await asyncio.open_unix_connection(path, limit=_ANSWER_BYTES_MAX)
                try:
                    writer.write(request.encode())
                    answer = (await reader.readuntil(b"\n\n")).decode()
                finally:
                    writer.close()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise Unavailable(f"wireguard-go does not answer for {name}: {error}") from error
        if (number := answer.rstrip("\n").rpartition("errno=")[2]) != "0":
            raise Unavailable(f"wireguard-go refuses a change of {name}: errno {number}")
        return answer


def socket_message(change: Change) -> str:
    """``change`` as wireguard-go's socket takes it: lines, ended by an empty one."""
    lines = ["set=1"]
    if change.private is not None:
        lines.append(f"private_key={change.private.hex()}")
    if change.port is not None:
        lines.append(f"listen_port={change.port}")
    for public in change.removed:
        lines += [f"public_key={public.hex()}", "remove=true"]
    for peer in change.put:
        lines += [
            f"public_key={peer.public.hex()}",
            f"endpoint={_joined(peer)}",
            f"persistent_keepalive_interval={KEEPALIVE_S}",
            "replace_allowed_ips=true",
            f"allowed_ip={peer.inner}/128",
        ]
    return "\n".join(lines) + "\n\n"


def parsed_device(text: str) -> FoundDevice:
    """What the socket answers to ``get=1``.  Raises: Unavailable: it is malformed."""
    private, port = b"", 0
    peers: dict[bytes, dict[str, Any]] = {}
    peer: dict[str, Any] = {}
    try:
        for line in text.splitlines():
            name, _, value = line.partition("=")
            match name:
                case "private_key":
                    private = bytes.fromhex(value)
                case "listen_port":
                    port = int(value)
                case "public_key":
                    peer = peers[bytes.fromhex(value)] = {"inner": ()}
                case "endpoint":
                    peer["has_endpoint"] = True
                case "persistent_keepalive_interval":
                    peer["keepalive_s"] = int(value)
                case "allowed_ip":
                    peer["inner"] = (*peer["inner"], value.removesuffix("/128"))
                case "last_handshake_time_sec":
                    peer["has_session"] = int(value) > 0
    except ValueError as error:
        raise Unavailable(f"wireguard-go answers what is not understood: {error}") from error
    return FoundDevice(
        private=private, port=port, peers={public: FoundPeer(**one) for public, one in peers.items()}
    )


def kernel_messages(change: Change) -> Iterable[dict[str, Any]]:
    """``change`` as arguments of pyroute2's ``WireGuard.set``, one peer each."""
    own: dict[str, Any] = {}
    if change.private is not None:
        own["private_key"] = b64encode(change.private).decode()
    if change.port is not None:
        own["listen_port"] = change.port
    if own:
        yield own
    for public in change.removed:
        yield {"peer": {"public_key": b64encode(public).decode(), "remove": True}}
    for peer in change.put:
        yield {
            "peer": {
                "public_key": b64encode(peer.public).decode(),
                "endpoint_addr": peer.endpoint,
                "endpoint_port": peer.port,
                "persistent_keepalive": KEEPALIVE_S,
                "replace_allowed_ips": True,
                "allowed_ips": [f"{peer.inner}/128"],
            }
        }


async def _read_kernel(wireguard: AsyncWireGuard, name: str) -> FoundDevice:
    """A device with many peers comes in several messages, and a peer with many addresses in several of those."""
    private, port = b"", 0
    peers: dict[bytes, FoundPeer] = {}
    async for message in await wireguard.info(name):
        private = b64decode(message.get_attr("WGDEVICE_A_PRIVATE_KEY") or b"") or private
        port = message.get_attr("WGDEVICE_A_LISTEN_PORT") or port
        for peer in message.get_attr("WGDEVICE_A_PEERS") or ():
            public = b64decode(peer.get_attr("WGPEER_A_PUBLIC_KEY"))
            before = peers.get(public, FoundPeer())
            handshake = peer.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME")
            allowed = tuple(
                one["addr"].removesuffix("/128") for one in peer.get_attr("WGPEER_A_ALLOWEDIPS") or ()
            )
            peers[public] = FoundPeer(
                inner=(*before.inner, *allowed),
                keepalive_s=peer.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") or before.keepalive_s,
                has_endpoint=peer.get_attr("WGPEER_A_ENDPOINT") is not None or before.has_endpoint,
                has_session=bool(handshake and handshake["tv_sec"]) or before.has_session,
            )
    return FoundDevice(private=private, port=port, peers=peers)


async def _move(home: AsyncIPRoute, name: str, namespace: Path, mtu: int) -> None:
    """Move the device ``name`` from ``home``, if its process has made it there already.

    It is moved while it is down: wireguard-go notices by itself when it is up in another namespace, within a second.
    """
    found = await home.link_lookup(ifname=name)
    if not found:
        return
    with namespace.open("rb") as target:
        await home.link("set", index=found[0], mtu=mtu)
        await home.link("set", index=found[0], net_ns_fd=target.fileno())


def _index_of(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _generic_socket() -> socket.socket:
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    return socket.socket(socket.AF_NETLINK, kind, _NETLINK_GENERIC)


def _joined(peer: Peer) -> str:
    address = f"[{peer.endpoint}]" if ip_address(peer.endpoint).version == 6 else peer.endpoint
    return f"{address}:{peer.port}"
