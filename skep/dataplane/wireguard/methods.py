"""Chooses the WireGuard implementation of this node: the configured one, else the first that works.

If none works, the node refuses encrypted networks.  It never sends their packets unencrypted.
"""

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
"""Features of the machine that each method needs.  ``ipv6``, because addresses inside the tunnels are IPv6."""


class Features(Protocol):
    """Features of the machine (``node.features``)."""

    @property
    def missing(self) -> Mapping[str, str]:
        """Features that the machine lacks, with the reason."""


class Refusal(msgspec.Struct, frozen=True):
    """This node cannot encrypt.  ``reason`` becomes part of the error of a task that needs encryption."""

    reason: str


def choose(features: Features, setting: str = "auto") -> Method | Refusal:
    """Choose the method.  ``setting`` is ``auto``, ``kernel`` or ``wireguard-go``."""
    for method in _ORDER[setting]:
        if not _lacking(features, method):
            return method
    return Refusal(
        f"this node cannot encrypt overlay networks ({_reasons_against(features, _ORDER[setting])})"
    )


def reasons_for_fallback(features: Features, setting: str = "auto") -> str:
    """Return why ``choose`` fell back to a later method.  Empty if it chose the first method, or none."""
    method, order = choose(features, setting), _ORDER[setting]
    return _reasons_against(features, order[: order.index(method)]) if isinstance(method, Method) else ""


def _reasons_against(features: Features, methods: Iterable[Method]) -> str:
    """Return which features that ``methods`` need are missing on this machine, with the kernel's errors."""
    lacking = {name: None for method in methods for name in _lacking(features, method)}
    return "; ".join(f"{name}: {features.missing[name]}" for name in lacking)


def _lacking(features: Features, method: Method) -> list[str]:
    return [name for name in _NEEDS[method] if name in features.missing]
