"""Stands for certificates and sockets in the agent of a simulated node: an identity, and the simulated network."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
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
    """Credentials that are always accepted and never expire.  Implements ``agent.agent.Credentials``."""

    def __init__(self, identity: Identity, network: Network, renew: Callable[[], None]) -> None:
        """``renew``: called when a manager requests a renewal."""
        self._renew = renew
        self.identity = identity
        self.tls_info = TLSInfo()
        self.changed = asyncio.Event()
        self._network = network

    def connected(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[Channel]:
        """A connection to the manager at ``address``.  Raises: Unavailable: not reachable."""
        # It has the methods of a real one.
        return cast(
            "AbstractAsyncContextManager[Channel]",
            self._network.connected(address, self.identity, timeout_s=timeout_s),
        )

    def take_roots(self, root_pem: bytes) -> None:
        """Roots are not checked."""

    def take_role(self, role: NodeRole) -> None:
        """The role is not part of a simulated certificate."""

    def want_renewal(self) -> None:
        """``sim.operators`` renews the certificate."""
        self._renew()

    async def run(self, choose: ChooseManager) -> None:
        """Nothing to renew; runs until cancelled."""
        await asyncio.Event().wait()


class NoLogs:
    """Simulated tasks write no logs.  Implements ``LogSource`` of the agent."""

    async def read_lines(self, query: LogQuery) -> AsyncIterator[Sequence[LogLine]]:
        nothing: tuple[Sequence[LogLine], ...] = ()
        for lines in nothing:
            yield lines
