"""Ports of a node that something else than tasks uses: its daemon, plain containers, and other programs of the machine.

The node reports them in engine labels, so that host-mode ports are published elsewhere.
"""

from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, TypeAlias

from skep.model.node import Node

PORTS_LABEL: Final = "skep.ports"
RESERVED_LABEL: Final = "skep.reserved-ports"
"""A node's own ports (``reserved_ports``); that of a manager counts for the whole cluster."""
PORTS_MAX = 1000
"""Ports in the label, the lowest ones of each protocol."""
_LABEL_CHARACTERS_MAX = 16 * 1024
_REMEMBERED_CHARACTERS_MAX = 512
"""Longer labels are read each time: a node that reports a new one every second would fill the memory with them."""

UsedPort: TypeAlias = tuple[str, int]
"""Protocol and number."""


def ports_label(ports: Iterable[UsedPort]) -> str:
    """``tcp=22,80 udp=53``"""
    by_protocol: dict[str, list[int]] = {}
    for protocol, number in sorted(set(ports)):
        by_protocol.setdefault(protocol, []).append(number)
    return " ".join(
        f"{protocol}={','.join(map(str, numbers[:PORTS_MAX]))}" for protocol, numbers in by_protocol.items()
    )


def shortened_ports(label: str, size: int) -> str:
    """The label with as many ports of each protocol, the lowest, as fit into ``size`` bytes."""
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
    """The ports in the node's labels; what cannot be read is ignored."""
    labels = node.description.engine.labels
    return ports_in(labels.get(PORTS_LABEL, "")) | ports_in(labels.get(RESERVED_LABEL, ""))


def ports_in(label: str) -> frozenset[UsedPort]:
    """The ports in the text of a label; what cannot be read is ignored."""
    label = label[:_LABEL_CHARACTERS_MAX]
    return _remembered(label) if len(label) <= _REMEMBERED_CHARACTERS_MAX else _read(label)


def _read(label: str) -> frozenset[UsedPort]:
    return frozenset(
        (protocol, int(number))
        for protocol, _, numbers in (item.partition("=") for item in label.split())
        for number in numbers.split(",")
        if number.isascii() and number.isdigit() and len(number) <= 5
    )


_remembered = lru_cache(4096)(_read)
