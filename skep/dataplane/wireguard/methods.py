"""Which WireGuard this node uses: as configured, else the first that works here, else none.  Never plain text."""

from collections.abc import Iterable, Mapping
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
    def missing(self) -> Mapping[str, str]:
        """Features that the machine lacks, with the reason."""


class Refusal(msgspec.Struct, frozen=True):
    """This node does not encrypt; ``reason`` is part of the error of a task that needs it to."""

    reason: str


def choose(features: Features, setting: str = "auto") -> Method | Refusal:
    """``setting``: ``auto``, ``kernel`` or ``wireguard-go``."""
    for method in _ORDER[setting]:
        if not _lacking(features, method):
            return method
    return Refusal(
        f"this node cannot encrypt overlay networks ({_reasons_against(features, _ORDER[setting])})"
    )


def reasons_for_fallback(features: Features, setting: str = "auto") -> str:
    """Why ``choose`` did not take the first method; empty: it did, or it took none."""
    method, order = choose(features, setting), _ORDER[setting]
    return _reasons_against(features, order[: order.index(method)]) if isinstance(method, Method) else ""


def _reasons_against(features: Features, methods: Iterable[Method]) -> str:
    """What each of ``methods`` needs and the machine lacks, with the kernel's errors."""
    lacking = {name: None for method in methods for name in _lacking(features, method)}
    return "; ".join(f"{name}: {features.missing[name]}" for name in lacking)


def _lacking(features: Features, method: Method) -> list[str]:
    return [name for name in _NEEDS[method] if name in features.missing]
