"""The probes of a peer's ports."""

import asyncio
from typing import Any

from skep.dataplane.probe.packets import Outcome
from skep.dataplane.probe.port_probe import PortChecks
from skep.model.networks.paths import PathCheck, PathPeer
from skep.model.values.ids import NodeId


class Meeting:
    """Probes that end only once two of them are in progress."""

    def __init__(self) -> None:
        self._both = asyncio.Barrier(2)

    async def tls_hello(self, _address: str, _port: int) -> Outcome:
        await self._both.wait()
        return Outcome(sent=2, answered=0, error="no response")

    connect = tls_hello


async def test_the_ports_of_a_manager_that_has_failed_are_probed_at_the_same_time() -> None:
    """One after the other, a manager that does not respond would be known twice as late."""
    ports: Any = Meeting()
    tunnels: Any = None
    peer = PathPeer(node_id=NodeId("m1"), hostname="m1", control="192.0.2.1:2377", etcd="192.0.2.1:2378")
    async with asyncio.timeout(10):
        found = await PortChecks(ports, tunnels).findings(None, peer)
    assert [(one.check, one.port, one.is_failing) for one in found] == [
        (PathCheck.CONTROL, "2377/tcp", True),
        (PathCheck.ETCD, "2378/tcp", True),
    ]
