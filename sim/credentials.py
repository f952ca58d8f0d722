"""What the agent of a simulated node has instead of certificates and sockets: its name, and the simulated network."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import cast

from sim.network import Network
from skep.agent.renewal import ChooseManager
from skep.model.logs import LogLine, LogQuery
from skep.model.meta import TLSInfo
from skep.model.node import NodeRole
from skep.security.identity import Identity
from skep.wire.client import Channel


class SimulatedCredentials:
    """Everybody believes them, and they never age.  Implements ``node.agent.Credentials``."""

    def __init__(self, identity: Identity, network: Network, renew: Callable[[], None]) -> None:
        """``renew``: called when managers ask for another certificate."""
        self._renew = renew
        self.identity = identity
        self.tls_info = TLSInfo()
        self.changed = asyncio.Event()
        self._network = network

    def connected(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[Channel]:
        """A connection to the manager at ``address``.  Raises: Unavailable: not reachable."""
        # It has the calls of a real one.
        return cast(
            "AbstractAsyncContextManager[Channel]",
            self._network.connected(address, self.identity, timeout_s=timeout_s),
        )

    def take_roots(self, root_pem: bytes) -> None:
        """There is nobody to distrust."""

    def take_role(self, role: NodeRole) -> None:
        """Roles stay as they are."""

    def want_renewal(self) -> None:
        """Somebody else does it, as they are nobody's but the simulation's."""
        self._renew()

    async def run(self, choose: ChooseManager) -> None:
        """There is nothing to do, until cancelled."""
        await asyncio.Event().wait()


class NoLogs:
    """Simulated tasks say nothing.  Implements ``node.assignments.LogSource``."""

    async def read(self, query: LogQuery) -> AsyncIterator[LogLine]:
        nothing: tuple[LogLine, ...] = ()
        for line in nothing:
            yield line
