"""The encrypted networks that a node carries, as the overlays applied them last."""

from collections.abc import Iterable, Mapping

from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.wireguard import tunnel_mtu, tunnelled
from skep.model.networks.tables import NetworkTable
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.values.ids import NetworkId, NodeId


class EncryptedNetworks:
    """Tables of encrypted networks, with this node and its device."""

    def __init__(self) -> None:
        self.node = NodeId("")
        self.underlay = Underlay("")
        self.vxlan_port = DEFAULT_DATA_PATH_PORT
        """The data path port of the cluster, or the default until it is known."""
        self.tables: tuple[NetworkTable, ...] | None = None
        """The tables, or None until some were applied."""
        self._tunnelled: dict[NetworkId, tuple[NetworkTable, Mapping[NodeId, str], NetworkTable]] = {}

    def set(self, node: NodeId, tables: Iterable[NetworkTable], underlay: Underlay) -> None:
        """Keep the encrypted networks among ``tables``."""
        self.node, self.underlay = node, underlay
        every = tuple(tables)
        self.vxlan_port = next((table.head.port for table in every), self.vxlan_port)
        self.tables = tuple(table for table in every if table.head.is_encrypted)
        carried = {table.head.id for table in self.tables}
        self._tunnelled = {id: one for id, one in self._tunnelled.items() if id in carried}

    @property
    def mtu(self) -> int:
        """MTU inside the tunnels."""
        return tunnel_mtu(self.underlay.mtu, is_ipv6=":" in self.underlay.address)

    def names(self) -> str:
        """Return the names of the networks, in order."""
        return ", ".join(sorted(table.head.name for table in self.tables or ()))

    def inside(self, table: NetworkTable, addresses: Mapping[NodeId, str]) -> NetworkTable:
        """Return a network's table with ``addresses`` inside the tunnels."""
        known = self._tunnelled.get(table.head.id)
        if known is None or known[0] is not table or known[1] != addresses:
            known = (table, addresses, tunnelled(table, self.node, addresses))
            self._tunnelled[table.head.id] = known
        return known[2]
