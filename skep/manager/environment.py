"""Settings, store, clock, and sources of ids and random numbers, for all compositions of a manager's parts."""

from random import Random
from typing import NamedTuple

from skep.aio.clock import Clock
from skep.bootstrap import ManagerConfig
from skep.model.values.ids import IdSource, NodeId
from skep.store.etcd.store import EtcdStore


class ManagerEnvironment(NamedTuple):
    """Environment of one manager."""

    config: ManagerConfig
    store: EtcdStore
    clock: Clock
    new_id: IdSource
    random: Random

    @property
    def own(self) -> NodeId:
        """Node id of this manager."""
        return self.config.node_id
