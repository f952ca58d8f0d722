"""The namespace of the tunnels is there whenever a VXLAN may be made in it."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skep.dataplane.netns.kernel import pinned
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.wireguard.tunnels import Options, WireGuardTunnels
from skep.model.networks.wireguard import EncryptionMethod
from skep.model.values.ids import NodeId
from skep.paths import Paths
from tests.support.encryption.wireguard import a_pair, a_secure_table
from tests.support.engine.oci_rig import QuickClock

pytestmark = pytest.mark.needs("root")

OWN, HERE = NodeId("n1"), Underlay("192.0.2.1")
SECURE = a_secure_table({"n1": (a_pair(1),), "n2": (a_pair(2),)})


class Removal:
    """Of the namespace, which begins and goes on only when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.may_go_on, self.is_done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        real = pinned.remove

        async def remove(pins: Namespaces, name: str) -> None:
            self.began.set()
            await self.may_go_on.wait()
            await real(pins, name)
            self.is_done.set()

        monkeypatch.setattr(pinned, "remove", remove)


@pytest.fixture
async def tunnels(tmp_path: Path) -> AsyncIterator[WireGuardTunnels]:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    paths.run.mkdir()
    pins, spaces = Namespaces(paths.tunnels), Namespaces(paths.netns)
    options = Options(method=EncryptionMethod.USER_SPACE, since_boot=lambda: 1.0)
    made = WireGuardTunnels(paths, spaces, options, Repairs(), QuickClock())
    running = asyncio.create_task(made.run(_moved))
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.wait([running])
        for name in pins.pinned():
            await pins.destroy(name)
        pins.close()
        spaces.close()


async def _moved() -> None:
    """Nothing follows."""


async def test_networks_that_come_back_while_the_tunnels_are_removed_have_them(
    tunnels: WireGuardTunnels, monkeypatch: pytest.MonkeyPatch
) -> None:
    removal = Removal(monkeypatch)
    await tunnels.apply(OWN, [SECURE], HERE)
    await tunnels.apply(OWN, [], HERE)
    await removal.began.wait()
    back = asyncio.create_task(tunnels.apply(OWN, [SECURE], HERE))
    await asyncio.wait([back], timeout=0.05)  # it may wait for the removal
    removal.may_go_on.set()
    await removal.is_done.wait()
    await back
    assert os.path.ismount(tunnels.namespace)


async def test_the_tunnels_are_there_for_a_container_that_comes_before_its_table(
    tunnels: WireGuardTunnels, monkeypatch: pytest.MonkeyPatch
) -> None:
    removal = Removal(monkeypatch)
    removal.may_go_on.set()
    async with tunnels.kept_open():
        await tunnels.apply(OWN, [], HERE)
        await asyncio.wait([asyncio.create_task(removal.began.wait())], timeout=0.2)
        assert os.path.ismount(tunnels.namespace)
        assert not removal.began.is_set()
    await removal.is_done.wait()
    assert not os.path.exists(tunnels.namespace)
