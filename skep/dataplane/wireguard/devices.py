"""Creates, reads and configures WireGuard devices as planned by ``plan/wireguard.py``.

Devices are created in the node's own namespace, where their UDP sockets stay, and moved to the tunnels' namespace,
where packets enter and leave them.  Kernel devices are configured over generic netlink (``kernel.py``), and devices of
wireguard-go over its Unix socket.

Sources: wireguard.com/xplatform (the protocol of the socket); wireguard.com/netns (the two namespaces).
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.plan.wireguard import KEEPALIVE_S, DeviceChange, FoundDevice, FoundPeer, WireGuardPeer
from skep.dataplane.wireguard import kernel
from skep.errors import Unavailable

SOCKETS = Path("/var/run/wireguard")
"""Folder of wireguard-go's sockets, compiled into it."""
_REPLY_S_MAX = 5.0
"""Time limit in seconds for a response of wireguard-go."""
_REPLY_BYTES_MAX = 1 << 24
"""Longest response in bytes, enough to list thousands of peers."""


class WireGuardDevices(Protocol):
    """The WireGuard devices of one node, by name."""

    async def place(self, name: str, namespace: Path, mtu: int) -> int:
        """Create the device in ``namespace``, or move it there.

        Returns its index there, or 0 if it does not exist yet.  Raises: Unavailable.
        """

    async def read_device(self, name: str, namespace: Path) -> FoundDevice:
        """Return the device's configuration.  Raises: Unavailable."""

    async def write(self, name: str, namespace: Path, change: DeviceChange) -> None:
        """Change the device's configuration.  Raises: Unavailable."""


class KernelDevices:
    """WireGuard devices of the kernel."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    async def place(self, name: str, namespace: Path, mtu: int) -> int:
        """Create the device from the node's own namespace directly in ``namespace``."""

        async def make(home: AsyncIPRoute, target: int) -> None:
            await home.link("add", ifname=name, kind="wireguard", mtu=mtu, net_ns_fd=target)

        try:
            return await _index_after(self._namespaces, name, namespace, make)
        except (OSError, NetlinkError) as error:
            raise Unavailable(f"the kernel cannot create a WireGuard device: {error}") from error

    async def read_device(self, name: str, namespace: Path) -> FoundDevice:
        """Read the configuration over generic netlink in ``namespace``."""
        try:
            return await self._namespaces.run(namespace, kernel.read_device, name)
        except OSError as error:
            raise Unavailable(f"the device {name} cannot be read: {error}") from error

    async def write(self, name: str, namespace: Path, change: DeviceChange) -> None:
        """Change the configuration, with as many messages as the peers need.

        A new private key and the removal of all peers are in one message.
        """
        try:
            await self._namespaces.run(namespace, kernel.change_device, name, change)
        except OSError as error:
            raise Unavailable(f"the device {name} cannot be configured: {error}") from error


class UserSpaceDevices:
    """WireGuard devices of wireguard-go, whose processes are supervised elsewhere."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    async def place(self, name: str, namespace: Path, mtu: int) -> int:
        """Move the device to ``namespace`` once its process has created it."""

        async def move(home: AsyncIPRoute, target: int) -> None:
            """Move the device if its process has created it already.

            The device is down while it is moved.  wireguard-go notices within a second when the device is up again in
            the other namespace.
            """
            for index in await home.link_lookup(ifname=name):
                await home.link("set", index=index, mtu=mtu)
                await home.link("set", index=index, net_ns_fd=target)

        try:
            return await _index_after(self._namespaces, name, namespace, move)
        except (OSError, NetlinkError) as error:
            raise Unavailable(f"the device {name} cannot be moved: {error}") from error

    async def read_device(self, name: str, namespace: Path) -> FoundDevice:
        """Read the configuration over the device's socket."""
        return parsed_device(await self._request(name, "get=1\n\n"))

    async def write(self, name: str, namespace: Path, change: DeviceChange) -> None:
        """Change the configuration with one message, which wireguard-go executes line by line."""
        await self._request(name, socket_message(change))

    async def _request(self, name: str, request: str) -> str:
        """Return wireguard-go's response.

        Raises: Unavailable: no process serves the socket, or it refused the request.
        """
        try:
            async with asyncio.timeout(_REPLY_S_MAX):
                path = str(SOCKETS / f"{name}.sock")
                reader, writer = await asyncio.open_unix_connection(path, limit=_REPLY_BYTES_MAX)
                try:
                    writer.write(request.encode())
                    reply = (await reader.readuntil(b"\n\n")).decode()
                finally:
                    writer.close()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise Unavailable(f"wireguard-go does not answer for {name}: {error}") from error
        if (number := reply.rstrip("\n").rpartition("errno=")[2]) != "0":
            raise Unavailable(f"wireguard-go refused a change of {name}: errno {number}")
        return reply


def socket_message(change: DeviceChange) -> str:
    """Return ``change`` as lines for wireguard-go's socket, ended by an empty line."""
    lines = ["set=1"]
    if change.private is not None:
        lines += ["replace_peers=true", f"private_key={change.private.hex()}"]
    if change.port is not None:
        lines.append(f"listen_port={change.port}")
    for public in change.removed:
        lines += [f"public_key={public.hex()}", "remove=true"]
    for peer in change.put:
        lines.append(f"public_key={peer.public.hex()}")
        lines += [f"endpoint={_joined(peer)}"] if peer.endpoint else []
        lines += [f"persistent_keepalive_interval={KEEPALIVE_S}", "replace_allowed_ips=true"]
        lines += [f"allowed_ip={one}/{128 if ':' in one else 32}" for one in peer.allowed]
    return "\n".join(lines) + "\n\n"


def parsed_device(text: str) -> FoundDevice:
    """Parse the socket's response to ``get=1``.  Raises: Unavailable: it is malformed."""
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
                    single = "/128" if ":" in value else "/32"
                    peer["inner"] = (*peer["inner"], value.removesuffix(single))
                case "last_handshake_time_sec":
                    peer["handshake_at"] = float(int(value))
                case "last_handshake_time_nsec":
                    peer["handshake_at"] += int(value) / 1e9
    except ValueError as error:
        raise Unavailable(f"wireguard-go sent an invalid response: {error}") from error
    return FoundDevice(
        private=private, port=port, peers={public: FoundPeer(**one) for public, one in peers.items()}
    )


async def _index_after(
    namespaces: Namespaces, name: str, namespace: Path, bring: Callable[[AsyncIPRoute, int], Awaitable[None]]
) -> int:
    """Return the index of the device ``name`` in ``namespace``, or 0 if it does not exist yet.

    If the device is not there, ``bring`` is called first, with netlink of the node's own namespace and an open file of
    ``namespace``.  Raises: OSError, NetlinkError.
    """
    if index := await namespaces.run(namespace, _index_of, name):
        return index
    with namespace.open("rb") as target:
        async with namespaces.netlink(namespaces.home) as home:
            await bring(home, target.fileno())
    return await namespaces.run(namespace, _index_of, name)


def _index_of(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _joined(peer: WireGuardPeer) -> str:
    address = f"[{peer.endpoint}]" if ip_address(peer.endpoint).version == 6 else peer.endpoint
    return f"{address}:{peer.port}"
