"""Reasons why the scheduler finds no node for a task, and their conversion to and from Docker's text.

A task's status holds only the text, as in SwarmKit.  Only this module writes and parses such texts, so the rest of the
manager compares reasons.
"""

import re
from collections.abc import Iterable
from enum import Enum
from typing import Final

from skep.model.values.counts import counted

NO_NODE: Final = "no suitable node"


class NodeRefusal(Enum):
    """Reason why the scheduler refused nodes.  The value is its text, with ``{nodes}`` for "1 node" or "3 nodes"."""

    NOT_READY = "{nodes} not available for new tasks"
    RESOURCES = "insufficient resources on {nodes}"
    ROOTLESS = "not possible on {nodes} in rootless mode"
    MAPPED_USERS = "not possible on {nodes} with userns-remap"
    DOCKER_NETWORK = "overlay network belongs to docker nodes, which does not fit {nodes}"
    SKEP_NETWORK = "overlay network belongs to skep nodes, which does not fit {nodes}"
    PATHS = "overlay traffic fails on {nodes}"
    PLUGIN = "missing plugin on {nodes}"
    CONSTRAINTS = "scheduling constraints not satisfied on {nodes}"
    PLATFORM = "unsupported platform on {nodes}"
    RIGHTS = "rights over the machine not allowed on {nodes}"
    DEVICE = "missing device on {nodes}"
    DISK = "disk full on {nodes}"
    HOST_PORT = "host-mode port already in use on {nodes}"
    UNKNOWN_SPECS = "unreadable task specs on {nodes}"
    MAX_REPLICAS = "max replicas per node limit exceed"  # Docker's spelling
    AFFINITY = "affinity not satisfied on {nodes}"
    ANTI_AFFINITY = "anti-affinity not satisfied on {nodes}"
    MAX_SKEW = "max skew exceeded on {nodes}"
    CLUSTER_VOLUMES = "cannot fulfill requested CSI volume mounts on {nodes}"

    def text(self, nodes: int) -> str:
        """Return the text for a number of nodes refused with this reason."""
        return self.value.format(nodes=counted(nodes, "node"))


FREED: Final = frozenset(
    {NodeRefusal.MAX_REPLICAS, NodeRefusal.RESOURCES, NodeRefusal.HOST_PORT, NodeRefusal.DISK}
)
"""Refusals that the end of a task may resolve.  A node names only the first filter that refused it."""

_SEPARATOR: Final = "; "
_PATTERNS: Final = {
    one: re.compile(
        rf"(?:^|\(|{_SEPARATOR}){re.escape(one.value).replace(re.escape('{nodes}'), '[0-9]+ nodes?')}(?=[;)]|$)"
    )
    for one in NodeRefusal
}


def refusals_text(refused: Iterable[tuple[NodeRefusal, int]]) -> str:
    """Return one text for the reasons, each with its number of nodes."""
    return _SEPARATOR.join(one.text(nodes) for one, nodes in refused)


FULL: Final = "FULL"
"""Key of the nodes without free resources in the record of a placement."""
BY_RULES: Final = "RULES"
"""Key in the record of a placement if affinities or the largest skew then chose among the suitable nodes."""


def placement_text(record: str) -> str:
    """Return the record of a placement in words.

    ``2/4,CONSTRAINTS=2|5|1|25%`` says that 2 of 4 nodes were suitable, and that the chosen one had 5 tasks, one of them
    of the same service, and was 25 % reserved afterwards.  An unknown key of another version stays as it is.
    """
    summary, _, figures = record.partition("|")
    suitable, *refused = summary.split(",")
    number, _, total = suitable.partition("/")
    parts = [f"{number} of {total} nodes suitable"]
    for one in refused:
        name, _, count = one.partition("=")
        if name in NodeRefusal.__members__ and count.isdigit():
            parts.append(NodeRefusal[name].text(int(count)))
        elif one == BY_RULES:
            parts.append("affinities or the largest skew chose among them")
        else:
            parts.append(f"at least {count} full" if name == FULL else one)
    tasks, _, rest = figures.partition("|")
    own, _, share = rest.partition("|")
    chosen = f"the chosen node had {tasks} task{'' if tasks == '1' else 's'}, {own} of its service"
    return _SEPARATOR.join([*parts, f"{chosen}, and is then {share} reserved" if share else chosen])


def no_node_text(refusals: str) -> str:
    """Return the error of a task that no node can run.  ``refusals`` is empty if the cluster has no node."""
    return f"{NO_NODE} ({refusals})" if refusals else NO_NODE


def node_refusals_in(error: str) -> frozenset[NodeRefusal]:
    """Return the reasons that a task's error names."""
    return frozenset(one for one, pattern in _PATTERNS.items() if pattern.search(error))


def is_no_node(error: str) -> bool:
    """Return whether a task's error says that no node can run it."""
    return error.startswith(NO_NODE)
