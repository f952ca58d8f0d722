"""Encrypted networks by the kernel's WireGuard, on kernels that have it (``docs/untested.md`` names where that was)."""

import asyncio
from pathlib import Path

import pytest

from skep.dataplane.plan.rotation import KeyLifetimes
from skep.model.networks.wireguard import EncryptionMethod
from skep.node.host.features import detect
from tests.integration.node import test_encrypted_overlay as by_process
from tests.support.encryption.encrypted_traffic import CLOCK, TEXT, transfer
from tests.support.encryption.secure_lab import wait_reaches
from tests.support.networks.overlay_lab import reaches, shell

pytestmark = [pytest.mark.needs("root", "ip", "nsenter"), pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def kernel(tmp_path: Path) -> None:
    missing = detect(tmp_path / "probe").missing
    if "wireguard" in missing:
        pytest.skip(f"this kernel has no WireGuard ({missing['wireguard']}): docs/untested.md")


async def test_nothing_readable_leaves(tmp_path: Path) -> None:
    async with by_process.a_pair(tmp_path, method=EncryptionMethod.KERNEL) as pair:
        content = TEXT * 20_000
        with pair.captured() as seen:
            assert await asyncio.to_thread(transfer, *pair.ends, content) == content
        assert sum(map(len, by_process.encrypted(seen))) > len(content), "all of it passed here"
        assert TEXT.strip() not in b"".join(seen)
        assert pair.secure.processes == {}, "no wireguard-go is needed"
        tunnels = pair.secure.networks[0].tunnels.namespace
        assert "wireguard" in await shell(tunnels, "ip -d link")


async def test_keys_change_under_load_without_a_loss(tmp_path: Path) -> None:
    limits = KeyLifetimes(period_s=20.0, overlap_s=10.0)
    async with by_process.a_pair(tmp_path, method=EncryptionMethod.KERNEL, limits=limits) as pair:
        await by_process.rotate_under_load(pair, 70.0)


async def test_a_deleted_device_is_made_anew_and_nothing_leaves_meanwhile(tmp_path: Path) -> None:
    async with by_process.a_pair(tmp_path, method=EncryptionMethod.KERNEL) as pair:
        device = by_process.device_name(pair.nodes[0].paths.run, 0)
        with pair.captured() as seen:
            await shell(pair.secure.networks[0].tunnels.namespace, f"ip link del {device}")
            await wait_reaches(pair.container, by_process.ADDRESSES[1], 30.0)
        assert by_process.only_wireguard(seen)


async def test_a_node_that_is_gone_from_the_tables_is_no_peer_at_once(tmp_path: Path) -> None:
    async with by_process.a_pair(tmp_path, method=EncryptionMethod.KERNEL) as pair:
        table = pair.secure.lab.tell(by_process.SECURE_TWO)
        gone = pair.nodes[1].id
        pair.secure.lab.tables[table.head.id] = by_process.without_node(table, gone)
        await pair.secure.lab.apply(pair.secure.networks[:1])
        async with asyncio.timeout(20):
            while await reaches(pair.container, by_process.ADDRESSES[1]):
                await CLOCK.sleep(0.1)
