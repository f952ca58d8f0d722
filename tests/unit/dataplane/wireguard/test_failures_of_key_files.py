"""WireGuard keys when their file cannot be read or written."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.wireguard import keys
from skep.dataplane.wireguard.tunnels import Options, WireGuardTunnels
from skep.errors import SkepError, Unavailable
from skep.model.networks.wireguard import EncryptionMethod, published_keys
from skep.model.values.ids import NodeId
from skep.paths import Paths
from tests.support.encryption.wireguard import a_pair, a_secure_table
from tests.support.engine.oci_rig import QuickClock
from tests.support.file_faults import Faults, walk

KEPT_PAIR = a_pair(1)
ENCRYPTED = a_secure_table({"n1": (KEPT_PAIR,), "n2": (a_pair(2),)})


@asynccontextmanager
async def a_nodes_tunnels(place: Path) -> AsyncIterator[WireGuardTunnels]:
    """Of node n1, in a process of its own."""
    paths = Paths(place / "data", place / "run")
    options = Options(method=EncryptionMethod.USER_SPACE, since_boot=lambda: 1.0)
    pins, spaces = Namespaces(paths.tunnels), Namespaces(paths.netns)
    try:
        yield WireGuardTunnels(paths, spaces, options, Repairs(), QuickClock())
    finally:
        for name in pins.pinned():
            await pins.destroy(name)
        pins.close()
        spaces.close()


def keys_of(tunnels: WireGuardTunnels) -> list[bytes]:
    return [one.key for one in published_keys(tunnels.labels())]


@pytest.mark.needs("root")
async def test_a_node_that_cannot_read_its_keys_publishes_no_others(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        async with a_nodes_tunnels(place) as tunnels:
            with suppress(Unavailable):  # its peers are not known yet
                assert keys_of(tunnels) == [KEPT_PAIR.public]
            with suppress(SkepError, OSError):
                await tunnels.apply(NodeId("n1"), [ENCRYPTED], Underlay("192.0.2.1"))
            assert keys_of(tunnels) == [KEPT_PAIR.public]
            faults.end()
            await tunnels.apply(NodeId("n1"), [ENCRYPTED], Underlay("192.0.2.1"))
            tunnels.require_keys()
            assert keys_of(tunnels) == [KEPT_PAIR.public]
            assert tunnels.address_of(NodeId("n2"))
        assert keys.load(place / "run/wireguard.keys") == (KEPT_PAIR,)

    (tmp_path / "template/run").mkdir(parents=True)
    keys.save(tmp_path / "template/run/wireguard.keys", (KEPT_PAIR,))
    assert await walk(tmp_path / "lives", life, template=tmp_path / "template", count=3) > 5


async def test_keys_that_could_not_be_saved_are_saved_later(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        found: list[bytes] = []
        async with a_nodes_tunnels(place) as tunnels:
            with suppress(Unavailable):
                found = keys_of(tunnels)
            faults.end()
            assert keys_of(tunnels) == (found or keys_of(tunnels))
            found = keys_of(tunnels)
        async with a_nodes_tunnels(place) as tunnels:
            assert keys_of(tunnels) == found

    (tmp_path / "template/run").mkdir(parents=True)
    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 4
