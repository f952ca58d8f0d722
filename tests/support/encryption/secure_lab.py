"""Nodes for tests of encrypted networks: an overlay lab whose nodes have WireGuard tunnels."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from skep.aio.clock import SystemClock
from skep.dataplane.dataplane import DataPlane
from skep.dataplane.plan.wireguard import device_name
from skep.dataplane.wireguard.tunnels import Options
from skep.model.networks.tables import Segment
from skep.model.networks.wireguard import EncryptionMethod
from tests.support.networks.overlay_lab import DUAL, TWO_SUBNETS, LabNode, OverlayLab, reaches

CLOCK = SystemClock()
SECURE_DUAL = msgspec.structs.replace(
    DUAL,
    is_encrypted=True,
    segments=(Segment("10.0.4.0/24", "10.0.4.1", 4100), Segment("fd04::/64", "fd04::1", 4101)),
)
SECURE_TWO = msgspec.structs.replace(TWO_SUBNETS, is_encrypted=True)


class WireGuardGo:
    """wireguard-go in a node's namespace, restarted when it ends, as its supervisor does.

    It outlives ``run``, unless it was dismissed.
    """

    def __init__(self, node: LabNode, slot: int) -> None:
        self._node = node
        self._name = device_name(node.paths.run, slot)
        self.is_dismissed = False
        self._may_run = asyncio.Event()
        self._may_run.set()
        self.process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        try:
            while True:
                await self._may_run.wait()
                if self.process is None or self.process.returncode is not None:
                    self.process = await asyncio.create_subprocess_exec(
                        "nsenter",
                        f"--net={self._node.home}",
                        "wireguard-go",
                        "--foreground",
                        self._name,
                        stdout=asyncio.subprocess.DEVNULL,
                        stderr=asyncio.subprocess.DEVNULL,
                        env={**os.environ, "LOG_LEVEL": "error"},
                    )
                await self.process.wait()
                await CLOCK.sleep(0.05)
        finally:
            if self.is_dismissed:
                await asyncio.shield(self.end())

    def dismiss(self) -> None:
        self.is_dismissed = True

    def stop(self) -> None:
        """Do not restart it when it ends."""
        self._may_run.clear()

    def resume(self) -> None:
        """Restart it again when it ends."""
        self._may_run.set()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    async def end(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


class SecureLab:
    """An overlay lab whose nodes encrypt.  ``processes``: wireguard-go processes by node and slot."""

    def __init__(self, lab: OverlayLab, options: Callable[[Options], Options] = lambda one: one) -> None:
        self.lab = lab
        self.processes: dict[tuple[str, int], WireGuardGo] = {}
        for node in lab.nodes:
            node.encryption = options(
                Options(
                    method=EncryptionMethod.USER_SPACE,
                    since_boot=CLOCK.since_boot,
                    process=lambda slot, node=node: self._process(node, slot),
                )
            )
        self.networks: list[DataPlane] = []
        self._stacks: list[AsyncExitStack] = []

    async def begin(self) -> None:
        """Start a node process on each node."""
        for node in self.lab.nodes:
            self._stacks.append(AsyncExitStack())
            self.networks.append(await self._stacks[-1].enter_async_context(node.running()))

    async def close(self) -> None:
        for stack in self._stacks:
            await stack.aclose()
        for process in self.processes.values():
            await process.end()

    def _process(self, node: LabNode, slot: int) -> WireGuardGo:
        known = self.processes.get((node.id, slot))
        if known is None or known.is_dismissed:
            known = self.processes[node.id, slot] = WireGuardGo(node, slot)
        return known

    async def stop(self, number: int) -> None:
        """End one node's process.  Its supervised processes continue."""
        await self._stacks[number].aclose()


async def encrypt(lab: OverlayLab, networks: Sequence[DataPlane]) -> None:
    """Create an encrypted network on all nodes, which must support encryption."""
    lab.tell(SECURE_TWO)
    await lab.apply(networks, SECURE_TWO.id)


@asynccontextmanager
async def secure_lab(
    root: Path, count: int, *, is_v6: bool = False, options: Callable[[Options], Options] = lambda one: one
) -> AsyncIterator[SecureLab]:
    async with OverlayLab(root, is_v6=is_v6).running(count) as lab:
        secure = SecureLab(lab, options)
        try:
            await secure.begin()
            yield secure
        finally:
            await secure.close()


async def wait_reaches(source, address: str, within_s: float = 10.0) -> float:  # type: ignore[no-untyped-def]
    """Return the seconds until ``address`` responds."""
    began = CLOCK.monotonic()
    async with asyncio.timeout(within_s):
        while not await reaches(source, address):
            pass
    return CLOCK.monotonic() - began
