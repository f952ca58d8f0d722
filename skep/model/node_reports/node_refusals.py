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
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,20}")
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


def named(nodes: Iterable[str]) -> str:
    """Return the part of a placement's record with the names of nodes.

    Names that could be confused with the record are left out, and so are long ones, because each task has a record.
    """
    names = [name for name in nodes if _NAME.fullmatch(name)]
    return f":{' '.join(names)}" if names else ""


def placement_text(record: str) -> str:
    """Return the record of a placement in words.

    ``2/4,CONSTRAINTS=2:n1 n2|5|1|25%|n4:6:0:50%`` says that 2 of 4 nodes were suitable, and which two were not.  The
    chosen one had 5 tasks, one of them of the same service, and was 25 % reserved afterwards.  The other one, n4, had 6
    and none, and would have been 50 % reserved.  With many nodes there are no names.  An unknown key of another version
    stays as it is.
    """
    summary, _, figures = record.partition("|")
    suitable, *refused = summary.split(",")
    number, _, total = suitable.partition("/")
    parts = [f"{number} of {total} nodes suitable"]
    for one in refused:
        name, _, value = one.partition("=")
        count, _, names = value.partition(":")
        if name in NodeRefusal.__members__ and count.isdigit():
            text = NodeRefusal[name].text(int(count))
            parts.append(f"{text} ({', '.join(names.split())})" if names else text)
        elif one == BY_RULES:
            parts.append("affinities or the largest skew chose among them")
        else:
            parts.append(f"at least {count} full" if name == FULL else one)
    tasks, _, rest = figures.partition("|")
    own, _, rest = rest.partition("|")
    share, _, others = rest.partition("|")
    chosen = f"the chosen node had {_tasks(tasks, own)}"
    parts.append(f"{chosen}, and is then {share} reserved" if share else chosen)
    for other in others.split():
        node, tasks, own, share = (*other.split(":"), "", "", "")[:4]
        text = f"{node} had {_tasks(tasks, own)}"
        parts.append(f"{text}, and would be {share} reserved" if share else text)
    return _SEPARATOR.join(parts)


def _tasks(tasks: str, own: str) -> str:
    return f"{tasks} task{'' if tasks == '1' else 's'}, {own} of its service"


def no_node_text(refusals: str) -> str:
    """Return the error of a task that no node can run.  ``refusals`` is empty if the cluster has no node."""
    return f"{NO_NODE} ({refusals})" if refusals else NO_NODE


def node_refusals_in(error: str) -> frozenset[NodeRefusal]:
    """Return the reasons that a task's error names."""
    return frozenset(one for one, pattern in _PATTERNS.items() if pattern.search(error))


def is_no_node(error: str) -> bool:
    """Return whether a task's error says that no node can run it."""
    return error.startswith(NO_NODE)
