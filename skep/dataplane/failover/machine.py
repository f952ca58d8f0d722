"""The failover addresses of this machine: its interfaces, announcements to the neighbors, and the administrator's hook.

The hook is for clouds, in which an address moves by a call of their API.  It is one file in a folder of root, so only
the machine's administrator decides what runs.

Without an announcement, other machines send to the former holder until their neighbor entries expire.

Source: RFC 5227 (2.3, ARP announcements) and RFC 4861 (7.2.6, unsolicited neighbor advertisements).
"""

import asyncio
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Final

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.race import LostRace, run_unless, wait_first
from skep.dataplane.door.derivation import proxies_on
from skep.dataplane.failover import hook_guard, interfaces
from skep.dataplane.failover.interfaces import AddressInterface
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.linux.commands import communicate
from skep.model.networks.failover import KERNEL_LATE_S, KERNEL_S, AddressOrder
from skep.model.networks.tables import NetworkTable
from skep.model.values.ids import NetworkId, NodeId
from skep.paths import why_open_to_others

log = structlog.get_logger(__name__)

HOOK: Final = Path("/etc/skep/hooks/failover-address")
"""Runs as ``failover-address ADDRESS NODE take|release``."""
ANNOUNCED_AFTER_S: Final = (0.0, 0.2, 0.8, 2.0, 5.0)
"""Pauses in seconds before announcements.

A switch may drop the first one, and a cache that was filled during the move is corrected by the later ones.
"""
TAKE_S_MAX: Final = 30.0
"""Seconds for the hook of a node that takes an address.  Calls of clouds' APIs take some seconds."""
RELEASE_S_MAX: Final = 5.0
"""Seconds for the hook of a node that releases an address.  The next node waits meanwhile."""
RETRY_S, RETRY_S_MAX = 1.0, 60.0
"""Seconds before the hook runs again after a failure: first, and at most."""
DROP_RETRY_S: Final = 0.1
"""Seconds before an address is removed again that the kernel has kept.  The next node waits meanwhile."""
LOOK_S: Final = 0.2
"""Longest seconds between two looks at the lease of a running hook.  After a suspend, less than this may be late."""
_OUTPUT_CHARACTERS = 200
"""Shown characters of the hook's output."""

_BROADCAST = b"\xff" * 6
"""The Ethernet address of all machines of the network."""
# Source: linux/if_ether.h: ETH_P_*.
_ARP, _IPV6 = 0x0806, 0x86DD
_ARP_HEADER = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
"""A request for an IPv4 address on Ethernet."""
_ALL_NODES = IPv6Address("ff02::1")
_ALL_NODES_ETHERNET = bytes.fromhex("333300000001")
# Source: RFC 4443 (2.3) and RFC 4861 (4.4, 4.6.1).
_ICMP6, _ADVERTISEMENT, _OVERRIDE, _TARGET_LINK_ADDRESS = 58, 136, 0x20000000, 2
_HOP_LIMIT = 255
"""Neighbors ignore advertisements with another limit, which may come from other networks."""


class AddressHook:
    """The administrator's hook.  ``path`` is its file."""

    def __init__(self, path: Path, node_name: str, clock: Clock, rng: Callable[[], float]) -> None:
        self._path = path
        self._node_name = node_name
        self._clock = clock
        self._rng = rng

    @property
    def exists(self) -> bool:
        """Whether there is a hook."""
        return self._path.exists()

    async def run(self, address: str, verb: str, timeout_s: float, left_s: Callable[[], float]) -> None:
        """Run the hook once, at most as long as ``left_s()`` seconds of the lease are left.

        Raises:
            FailedPrecondition: Others may change it.
            Unavailable: It failed, or the lease is over.
        """
        require_of_root(self._path)
        read, write = os.pipe()
        os.set_blocking(write, False)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-m", hook_guard.__name__, str(read)),
                *(str(self._path), address, self._node_name, verb),
                pass_fds=(read,),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={"PATH": os.defpath, "HOME": "/root"},
                cwd="/",
                start_new_session=True,
            )
            output, _ = await run_unless(
                communicate(process, timeout_s, leads_session=True), self._extend(write, left_s)
            )
        except LostRace:
            raise Unavailable(f"{self._path} {verb}: the lease of the address is over") from None
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"no end within {timeout_s:g} s"
            raise Unavailable(f"{self._path} {verb}: {reason}") from error
        finally:
            os.close(read)
            os.close(write)
        if process.returncode:
            text = output.decode(errors="replace").strip().rpartition("\n")[2][:_OUTPUT_CHARACTERS]
            raise Unavailable(f"{self._path} {verb}: exit code {process.returncode}: {text}")

    async def _extend(self, pipe: int, left_s: Callable[[], float]) -> None:
        """Tell the guard the end of the lease until it is over."""
        while (seconds := left_s()) > 0:
            os.write(pipe, b"%f\n" % (time.clock_gettime(time.CLOCK_BOOTTIME) + seconds))
            await self._clock.sleep(min(seconds, LOOK_S))

    async def run_until_done(
        self, address: str, report: Callable[[str], None], left_s: Callable[[], float]
    ) -> None:
        """Run ``take`` until it succeeds, and not after the lease, which lasts for ``left_s()``.

        ``report`` gets each failure, and an empty text at the end.
        """
        backoff = Backoff(RETRY_S, RETRY_S_MAX, rng=self._rng)
        while left_s() > 0:
            try:
                await self.run(address, "take", TAKE_S_MAX, left_s)
            except SkepError as error:
                log.warning(
                    "hook of a failover address failed, will retry", address=address, reason=str(error)
                )
                report(str(error))
                await backoff.sleep(self._clock)
            else:
                report("")
                return


def require_of_root(path: Path) -> None:
    """Check that only root can change a program.  Raises: FailedPrecondition."""
    try:
        why = why_open_to_others(path)
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be run: {error}") from error
    if why:
        raise FailedPrecondition(f"{path} is not run, because {why}")


class MachineAddresses:
    """Implements ``agent.session.address_stream.AddressKernel``.  ``run`` has to be running."""

    def __init__(
        self,
        namespaces: Namespaces,
        clock: Clock,
        hook: AddressHook,
        report: Callable[[str], None],
    ) -> None:
        """``report`` sets the node's condition, or clears it with an empty text."""
        self._namespaces = namespaces
        self._clock = clock
        self._hook = hook
        self._report = report
        self._interfaces: dict[str, AddressInterface] = {}
        self._failures: dict[str, str] = {}
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Announce addresses and run hooks until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await asyncio.Event().wait()
        finally:
            self._group = None

    async def hold(self, order: AddressOrder, is_allowed: Callable[[], bool]) -> bool:
        """Add the address or extend its lifetime.  Return whether it was added.  Raises: FailedPrecondition."""
        known = self._interfaces.get(order.address)
        try:
            added = await self._inside(partial(interfaces.hold, order, is_allowed, known))
        except OSError as error:
            raise FailedPrecondition(f"{order.address} cannot be added: {error}") from error
        if added is not None:
            self._interfaces[order.address] = added
        return added is not None

    async def drop(self, order: AddressOrder) -> bool:
        """Remove the address if it is there.  Return whether it is certainly removed."""
        if (job := self._jobs.get(order.address)) is not None:
            job.cancel()
        self._interfaces.pop(order.address, None)
        self._note(order.address, "")
        try:
            await self._inside(partial(interfaces.drop, order))
        except OSError as error:  # its lifetime ends within seconds
            log.warning("failover address not removed", address=order.address, reason=str(error))
            return False
        return True

    def took(self, order: AddressOrder, left_s: Callable[[], float]) -> None:
        """Announce an added address, and run the hook, both as long as ``left_s()`` seconds of the lease are left."""
        former = self._jobs.get(order.address)
        if former is not None:
            former.cancel()
        if self._group is not None:
            job = self._group.create_task(
                self._take(order.address, former, left_s), name=f"announce {order.address}"
            )
            self._jobs[order.address] = job
            job.add_done_callback(partial(self._forget_job, order.address))

    async def release(self, order: AddressOrder, left_s: Callable[[], float]) -> None:
        """Wait until a dropped address is removed, and run its hook, at most as long as the lease lasts."""
        await self._wait_removed(order)
        if (job := self._jobs.get(order.address)) is not None:
            await asyncio.wait((job,))  # its hook must not act after the other one
        if self._hook.exists and left_s() > 0:
            try:
                await self._hook.run(order.address, "release", RELEASE_S_MAX, left_s)
            except SkepError as error:
                log.warning("hook of a failover address failed", address=order.address, reason=str(error))

    async def _wait_removed(self, order: AddressOrder) -> None:
        """Remove an address again until the kernel does it, or has surely dropped it by itself."""
        gone_at = self._clock.monotonic() + KERNEL_S + KERNEL_LATE_S
        while self._clock.monotonic() < gone_at and not await self.drop(order):
            await self._clock.sleep(DROP_RETRY_S)

    def _forget_job(self, address: str, job: asyncio.Task[None]) -> None:
        if self._jobs.get(address) is job:
            del self._jobs[address]

    async def _take(
        self, address: str, former: asyncio.Task[None] | None, left_s: Callable[[], float]
    ) -> None:
        if former is not None:
            await asyncio.wait((former,))
        await wait_first(self._announce_and_run_hook(address, left_s), self._wait_over(left_s))

    async def _announce_and_run_hook(self, address: str, left_s: Callable[[], float]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce(address, left_s), name=f"announce {address}")
            if self._hook.exists:
                await self._hook.run_until_done(address, partial(self._note, address), left_s)

    async def _wait_over(self, left_s: Callable[[], float]) -> None:
        """Return when the lease is over.  It also counts the time in which the machine is suspended."""
        while (seconds := left_s()) > 0:
            await self._clock.sleep(min(seconds, LOOK_S))

    async def _announce(self, address: str, left_s: Callable[[], float]) -> None:
        interface = self._interfaces.get(address)
        if interface is None or not interface.ethernet:
            return
        for pause_s in ANNOUNCED_AFTER_S:
            await self._clock.sleep(pause_s)
            if left_s() <= 0:
                return
            try:
                await self._inside(partial(announce, address, interface.name, interface.ethernet))
            except OSError as error:
                log.warning("failover address not announced", address=address, reason=str(error))

    async def _inside(self, call: Callable[[], AddressInterface | None]) -> AddressInterface | None:
        return await self._namespaces.run(self._namespaces.home, call)

    def _note(self, address: str, failure: str) -> None:
        """Record the last failure of the hook for an address, and report all failures."""
        self._failures.pop(address, None)
        if failure:
            self._failures[address] = failure
        self._report("; ".join(f"{one}: {reason}" for one, reason in sorted(self._failures.items())))


class DoorWatch:
    """Notes whether this node runs the front door, since only such a node may hold addresses (``TableListener``)."""

    def __init__(self, want: Callable[[bool], None]) -> None:
        self._want = want

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        """Look for proxies of this node in the table of the door's network."""
        self._want(any(proxies_on(one, node_id) for one in tables.values() if one.head.is_door))


def announce(address: str, interface: str, ethernet: bytes) -> None:
    """Send one announcement in the calling thread's namespace.  Raises: OSError."""
    frame = announcement(address, ethernet)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as packets:
        packets.bind((interface, 0))
        packets.send(frame)


def announcement(address: str, ethernet: bytes) -> bytes:
    """Return the Ethernet frame that announces ``address`` at the hardware address ``ethernet``."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        packet = _advertisement(ip, ethernet)
        return _ALL_NODES_ETHERNET + ethernet + _IPV6.to_bytes(2, "big") + packet
    # The sender and the target are the announced address.
    arp = _ARP_HEADER + ethernet + ip.packed + bytes(6) + ip.packed
    return _BROADCAST + ethernet + _ARP.to_bytes(2, "big") + arp


def _advertisement(ip: IPv6Address, ethernet: bytes) -> bytes:
    body = struct.pack("!I16sBB6s", _OVERRIDE, ip.packed, _TARGET_LINK_ADDRESS, 1, ethernet)
    message = struct.pack("!BBH", _ADVERTISEMENT, 0, 0) + body
    pseudo = ip.packed + _ALL_NODES.packed + struct.pack("!II", len(message), _ICMP6)
    message = struct.pack("!BBH", _ADVERTISEMENT, 0, checksum(pseudo + message)) + body
    header = struct.pack("!IHBB", 6 << 28, len(message), _ICMP6, _HOP_LIMIT)
    return header + ip.packed + _ALL_NODES.packed + message


def checksum(data: bytes) -> int:
    """Return the checksum of the internet protocols over ``data``, which has an even length.  Source: RFC 1071."""
    total: int = sum(word for (word,) in struct.iter_unpack("!H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
