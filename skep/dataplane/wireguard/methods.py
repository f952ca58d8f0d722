"""Which WireGuard this node uses: as configured, else the first that works here, else none.  Never plain text."""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from skep.model.wireguard import Method

_ORDER: Mapping[str, tuple[Method, ...]] = {
    "auto": (Method.KERNEL, Method.USER_SPACE),
    "kernel": (Method.KERNEL,),
    "wireguard-go": (Method.USER_SPACE,),
}
_NEEDS = {
    Method.KERNEL: ("wireguard", "vxlan", "ipv6"),
    Method.USER_SPACE: ("wireguard-go", "tun", "vxlan", "ipv6"),
}
"""Features of the machine; addresses inside the tunnels are of IPv6."""


class Features(Protocol):
    """What the machine can do (``node.features``)."""

    @property
    def missing(self) -> Mapping[str, str]: ...


class Refusal(msgspec.Struct, frozen=True):
    """This node does not encrypt; ``reason`` is part of the error of a task that needs it to."""

    reason: str


def choose(features: Features, setting: str = "auto") -> Method | Refusal:
    """``setting``: ``auto``, ``kernel`` or ``wireguard-go``."""
    reasons: dict[str, None] = {}
    for method in _ORDER[setting]:
        lacking = [name for name in _NEEDS[method] if name in features.missing]
        if not lacking:
            return method
        reasons |= {f"{name}: {features.missing[name]}": None for name in lacking}
    return Refusal(f"this node cannot encrypt overlay networks ({'; '.join(reasons)})")
