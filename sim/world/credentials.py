"""Simulated credentials for a node's agent: an identity on the simulated network, without certificates and sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import cast

from sim.world.certificates import Certificates
from sim.world.network import Network
from skep.agent.renewal import ChooseManager
from skep.model.logs import LogLine, LogQuery
from skep.model.node import NodeRole
from skep.model.values.meta import TLSInfo
from skep.security.identity import NodeIdentity
from skep.wire.client import ManagerChannel


class SimulatedCredentials:
    """Credentials that never expire.  Implements ``agent.agent.Credentials``."""

    def __init__(
        self, identity: NodeIdentity, network: Network, certificates: Certificates, renew: Callable[[], None]
    ) -> None:
        """``renew``: called when a manager requests a renewal."""
        self._renew = renew
        self.identity = identity
        self.changed = certificates.changed[identity.node_id] = asyncio.Event()
        self._certificates = certificates
        self._network = network

    @property
    def tls_info(self) -> TLSInfo:
        """Return the issuer of the certificate, and the trusted roots."""
        held = self._certificates.held.get(self.identity.node_id)
        return held.tls_info if held is not None else TLSInfo()

    def connect(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to the manager at ``address``.  Raises: Unavailable: not reachable."""
        # A ``MemoryChannel`` has the methods of a ``ManagerChannel``.
        return cast(
            "AbstractAsyncContextManager[ManagerChannel]",
            self._network.connect(address, self.identity, timeout_s=timeout_s),
        )

    def take_roots(self, root_pem: bytes) -> None:
        """Trust the roots that a manager has sent."""
        self._certificates.trust(self.identity.node_id, root_pem.decode())

    def take_role(self, role: NodeRole) -> None:
        """The role is not part of a simulated certificate."""

    def want_renewal(self) -> None:
        """``sim.users.operators`` renews the certificate."""
        self._renew()

    async def run(self, choose: ChooseManager) -> None:
        """Run until cancelled.  There is nothing to renew."""
        await asyncio.Event().wait()


class NoLogs:
    """Simulated tasks write no logs.  Implements ``LogSource`` of the agent."""

    async def read_lines(self, query: LogQuery) -> AsyncIterator[Sequence[LogLine]]:
        nothing: tuple[Sequence[LogLine], ...] = ()
        for lines in nothing:
            yield lines
