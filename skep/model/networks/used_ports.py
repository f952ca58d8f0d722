"""Ports of a node that are in use, but not by tasks: by its daemon, plain containers, and other programs.

The node reports them in engine labels, so that host-mode ports are published elsewhere.
"""

from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, TypeAlias

from skep.model.node import Node

PORTS_LABEL: Final = "skep.ports"
RESERVED_LABEL: Final = "skep.reserved-ports"
"""Engine label with a node's own ports (``reserved_ports``).  A manager's label applies to the whole cluster."""
PORTS_MAX = 1000
"""Ports in the label, the lowest ones of each protocol."""
_LABEL_CHARACTERS_MAX = 16 * 1024
"""Characters of a node's label that are read.  Nodes are not trusted."""
_REMEMBERED_CHARACTERS_MAX = 512
"""Longer labels are not cached: a node that reports a new label every second would fill the memory with them."""

UsedPort: TypeAlias = tuple[str, int]
"""Protocol and number."""


def ports_label(ports: Iterable[UsedPort]) -> str:
    """Return the label for ``ports``, such as ``tcp=22,80 udp=53``."""
    by_protocol: dict[str, list[int]] = {}
    for protocol, number in sorted(set(ports)):
        by_protocol.setdefault(protocol, []).append(number)
    return " ".join(
        f"{protocol}={','.join(map(str, numbers[:PORTS_MAX]))}" for protocol, numbers in by_protocol.items()
    )


def shortened_ports(label: str, size: int) -> str:
    """Return the label with as many of the lowest ports of each protocol as fit into ``size`` bytes."""
    by_protocol: dict[str, list[int]] = {}
    for protocol, number in sorted(_read(label)):
        by_protocol.setdefault(protocol, []).append(number)

    def shortened(count: int) -> str:
        return ports_label(
            (protocol, number) for protocol, some in by_protocol.items() for number in some[:count]
        )

    longest = max(map(len, by_protocol.values()), default=0)
    count = bisect_left(range(longest), True, key=lambda count: len(shortened(count + 1).encode()) > size)
    return shortened(count)


def used_ports_of(node: Node) -> frozenset[UsedPort]:
    """Return the ports in the node's labels; invalid parts are ignored."""
    labels = node.description.engine.labels
    return ports_in(labels.get(PORTS_LABEL, "")) | ports_in(labels.get(RESERVED_LABEL, ""))


def ports_in(label: str) -> frozenset[UsedPort]:
    """Return the ports in the text of a label; invalid parts are ignored."""
    label = label[:_LABEL_CHARACTERS_MAX]
    return cached_answer(label) if len(label) <= _REMEMBERED_CHARACTERS_MAX else _read(label)


def _read(label: str) -> frozenset[UsedPort]:
    return frozenset(
        (protocol, int(number))
        for protocol, _, numbers in (item.partition("=") for item in label.split())
        for number in numbers.split(",")
        if number.isascii() and number.isdigit() and len(number) <= 5
    )


cached_answer = lru_cache(4096)(_read)
