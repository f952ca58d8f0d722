"""Encrypted networks as a node has them: tables, keys and the forwarder process, over IPv4 and IPv6, healed by hand."""

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from bench.overlay_pair import FORWARDER_PROGRAM
from skep.aio.backoff import Backoff
from skep.aio.clock import SystemClock
from skep.dataplane.container_network import ContainerNetwork
from skep.dataplane.encrypted.client import ForwarderClient
from skep.dataplane.encrypted.frames import GSO_BYTES_MAX
from skep.dataplane.encrypted.methods import Refusal
from skep.dataplane.encrypted.overlays import EncryptedOverlays
from skep.errors import FailedPrecondition
from skep.manager.discovery.overlay_keys import KeyRing, first_ring, pair_keys
from skep.model.ids import NodeId
from skep.model.pair_keys import KeysTold, Method, PeerKeys
from skep.model.tables import Segment
from skep.model.times import timestamp
from tests.integration.node.overlay_lab import (
    DUAL,
    TWO_SUBNETS,
    LabNode,
    OverlayLab,
    carried,
    place,
    reaches,
    shell,
)

pytestmark = [pytest.mark.needs("root", "ip", "nsenter"), pytest.mark.timeout(60)]

CLOCK = SystemClock()
SECURE_DUAL = msgspec.structs.replace(
    DUAL,
    is_encrypted=True,
    segments=(Segment("10.0.4.0/24", "10.0.4.1", 4100), Segment("fd04::/64", "fd04::1", 4101)),
)
SECURE_TWO = msgspec.structs.replace(TWO_SUBNETS, is_encrypted=True)
SIZE = 10_000_000


class Forwarder:
    """The forwarder process in a node's namespace, started again when it ends, as its supervisor does."""

    def __init__(self, node: LabNode) -> None:
        self._node = node
        self.process: asyncio.subprocess.Process | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def run(self) -> None:
        self._node.paths.run.mkdir(parents=True, exist_ok=True)
        program = [
            sys.executable,
            "-c",
            FORWARDER_PROGRAM,
            str(self._node.paths.data),
            str(self._node.paths.run),
        ]
        backoff = Backoff(0.05, 1.0)
        while True:
            self.process = await asyncio.create_subprocess_exec(
                "nsenter", f"--net={self._node.home}", *program, stdout=subprocess.DEVNULL
            )
            try:
                await self.process.wait()
            except BaseException:
                self.process.terminate()
                await asyncio.shield(self.process.wait())
                raise
            await backoff.sleep(CLOCK)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)


class SecureLab:
    """An overlay lab whose nodes encrypt."""

    def __init__(self, lab: OverlayLab, networks: list[ContainerNetwork]) -> None:
        self.lab = lab
        self.networks = networks
        self.forwarders = [Forwarder(node) for node in lab.nodes]
        self.encrypted: list[EncryptedOverlays] = []

    def give_keys(self, ring: KeyRing) -> None:
        """As a manager tells them."""
        ids = [node.id for node in self.lab.nodes]
        for id, encrypted in zip(ids, self.encrypted, strict=True):
            others = (NodeId(other) for other in ids if other != id)
            peers = tuple(PeerKeys(node_id=other, keys=pair_keys(ring, id, other)) for other in others)
            encrypted.told(KeysTold(peers=peers, is_complete=True))

    @asynccontextmanager
    async def running(self) -> AsyncIterator["SecureLab"]:
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(asyncio.TaskGroup())
            running = []
            for node, network, forwarder in zip(self.lab.nodes, self.networks, self.forwarders, strict=True):
                client = ForwarderClient(node.paths.forwarder_socket, CLOCK, random.random)
                stack.callback(client.close)
                made = EncryptedOverlays(
                    Method.USER_SPACE,
                    client,
                    forwarder,
                    is_running=lambda forwarder=forwarder: forwarder.is_running,
                    clock=CLOCK,
                    chance=random.random,
                )
                network.overlays.encrypt_with(made)
                self.encrypted.append(made)
                running.append(group.create_task(made.run()))
            self.give_keys(first_ring(random.randbytes, timestamp(CLOCK.now_ns()), 1))
            yield self
            for task in running:
                task.cancel()


@asynccontextmanager
async def secure_lab(root: Path, count: int, *, is_v6: bool = False) -> AsyncIterator[SecureLab]:
    async with (
        OverlayLab(root, is_v6=is_v6).running(count) as lab,
        lab.networks() as networks,
        SecureLab(lab, networks).running() as secure,
    ):
        yield secure


async def wait_reaches(source, address: str, within_s: float = 10.0) -> float:  # type: ignore[no-untyped-def]
    """Seconds until ``address`` answers."""
    began = CLOCK.monotonic()
    async with asyncio.timeout(within_s):
        while not await reaches(source, address):
            pass
    return CLOCK.monotonic() - began


@pytest.mark.parametrize("is_v6", [False, True], ids=["IPv4 between nodes", "IPv6 between nodes"])
async def test_both_versions_of_ip_inside_and_between(tmp_path: Path, is_v6: bool) -> None:
    async with secure_lab(tmp_path, 2, is_v6=is_v6) as secure:
        lab, networks = secure.lab, secure.networks
        one = await lab.nodes[0].attach(networks[0], place(SECURE_DUAL, "10.0.4.5/24", "fd04::5/64"))
        other = await lab.nodes[1].attach(networks[1], place(SECURE_DUAL, "10.0.4.6/24", "fd04::6/64"))
        lab.tell(SECURE_DUAL)
        await lab.apply(networks)
        await wait_reaches(one, "10.0.4.6")
        await wait_reaches(one, "fd04::6")
        for address in ("10.0.4.6", "fd04::6"):
            assert await carried(lab.nodes[0].namespaces, other, one, address, SIZE) == SIZE
        shown = await shell(one.netns, "ip -d link show eth0")
        assert f"mtu {1384 if is_v6 else 1404} " in shown
        assert f"gso_max_size {GSO_BYTES_MAX} " in shown
        sockets = await shell(lab.nodes[0].home, "ss -Huan")
        assert ":4799" in sockets
        assert ":4789" not in sockets, "no VXLAN takes anything"


async def test_subnets_of_an_encrypted_network_reach_each_other(tmp_path: Path) -> None:
    async with secure_lab(tmp_path, 3) as secure:
        lab, networks = secure.lab, secure.networks
        places = [("10.0.2.5/24",), ("10.0.3.6/24",), ("10.0.2.7/24",)]
        ends = [
            await node.attach(network, place(SECURE_TWO, *addresses))
            for node, network, addresses in zip(lab.nodes, networks, places, strict=True)
        ]
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        for end in ends:
            for (address,) in places:
                await wait_reaches(end, address.partition("/")[0])


@pytest.mark.slow
async def test_what_is_deleted_by_hand_is_back_within_five_seconds(tmp_path: Path) -> None:
    async with secure_lab(tmp_path, 2) as secure:
        lab, networks = secure.lab, secure.networks
        one = await lab.nodes[0].attach(networks[0], place(SECURE_TWO, "10.0.2.5/24"))
        await lab.nodes[1].attach(networks[1], place(SECURE_TWO, "10.0.2.6/24"))
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        await wait_reaches(one, "10.0.2.6")
        overlay = lab.nodes[0].paths.overlays / SECURE_TWO.id
        for deed in (
            "ip link del enc4098",
            "ip link set enc4098 nomaster",
            "ip link set enc4098 down",
            "ip link del br0",
        ):
            await shell(overlay, deed)
            assert await wait_reaches(one, "10.0.2.6") < 5.0 + 3.0, f"{deed} (a ping waits up to 3 s)"
        secure.forwarders[0].kill()
        assert await wait_reaches(one, "10.0.2.6") < 2.0 + 3.0


async def test_a_node_that_cannot_encrypt_takes_no_container_and_leaves_nothing(tmp_path: Path) -> None:
    async with OverlayLab(tmp_path).running(1) as lab, lab.networks() as networks:
        forwarder = Forwarder(lab.nodes[0])
        client = ForwarderClient(lab.nodes[0].paths.forwarder_socket, CLOCK, random.random)
        made = EncryptedOverlays(
            Refusal("this node cannot"),
            client,
            forwarder,
            is_running=lambda: False,
            clock=CLOCK,
            chance=random.random,
        )
        networks[0].overlays.encrypt_with(made)
        with pytest.raises(
            FailedPrecondition, match="network two is encrypted, and this node cannot; nothing is sent"
        ):
            await lab.nodes[0].attach(networks[0], place(SECURE_TWO, "10.0.2.5/24"))
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        assert lab.nodes[0].namespaces.pinned() == []
        assert forwarder.process is None


async def test_a_node_without_keys_exchanges_nothing_until_it_is_told(tmp_path: Path) -> None:
    async with secure_lab(tmp_path, 2) as secure:
        lab, networks = secure.lab, secure.networks
        one = await lab.nodes[0].attach(networks[0], place(SECURE_TWO, "10.0.2.5/24"))
        await lab.nodes[1].attach(networks[1], place(SECURE_TWO, "10.0.2.6/24"))
        secure.encrypted[1].told(KeysTold(is_complete=True))
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        assert not await reaches(one, "10.0.2.6")
        secure.give_keys(first_ring(random.randbytes, timestamp(CLOCK.now_ns()), 1))
        await wait_reaches(one, "10.0.2.6")
