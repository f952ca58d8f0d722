"""What of the tables has to be worked out anew after a change."""

from skep.model.ids import NetworkId, NodeId, ServiceId, TaskId


class Stale:
    """What has to be worked out anew."""

    def __init__(self) -> None:
        # Ordered, so that every run is the same.
        self.networks: dict[NetworkId, None] = {}
        """Whether they are there, and all that follows from it."""
        self.heads: dict[NetworkId, None] = {}
        self.endpoints: dict[tuple[NetworkId, TaskId], None] = {}
        self.services: dict[tuple[NetworkId, ServiceId], None] = {}
        self.nodes: dict[tuple[NetworkId, NodeId], None] = {}
        self.takers: set[NodeId] = set()
        self.is_everybody = False
