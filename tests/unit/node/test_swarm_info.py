"""The ``Swarm`` section of ``docker info``, as far as it needs no manager."""

import pytest

from skep.agent.session.managers import KnownManager
from skep.model.values.ids import ClusterId, NodeId
from skep.node.cluster.local import LocalNode
from skep.node.cluster.swarm_info import local_section

LOOPBACK = KnownManager(NodeId("m1"), "127.0.0.1:2377")
NOWHERE = KnownManager(NodeId("m2"), "manager.invalid:2377")


@pytest.mark.parametrize(
    ("advertised", "local", "managers", "address"),
    [
        ("10.0.0.5:2377", "10.0.0.5", (LOOPBACK,), "10.0.0.5"),
        ("", "10.0.0.5", (LOOPBACK,), "10.0.0.5"),
        ("", "0.0.0.0", (NOWHERE, LOOPBACK), "127.0.0.1"),
        ("", "::", (KnownManager(NodeId("m1"), "[::1]:2377"),), "::1"),
        ("", "0.0.0.0", (NOWHERE,), "0.0.0.0"),
    ],
)
def test_a_worker_that_listens_everywhere_has_the_address_that_managers_see(
    advertised: str, local: str, managers: tuple[KnownManager, ...], address: str
) -> None:
    node = LocalNode(
        node_id=NodeId("w1"),
        cluster_id=ClusterId("c"),
        is_manager=False,
        listen_addr="0.0.0.0:2377",
        advertise_addr=advertised,
        local_addr=local,
    )
    section = local_section(node, status="active", error="", managers=managers)
    assert section["NodeAddr"] == address
