"""Chooses the WireGuard implementation of this node: the configured one, else the first that works.

If none works, the node refuses encrypted networks.  It never sends their packets unencrypted.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from skep.model.networks.wireguard import EncryptionMethod

_ORDER: Mapping[str, tuple[EncryptionMethod, ...]] = {
    "auto": (EncryptionMethod.KERNEL, EncryptionMethod.USER_SPACE),
    "kernel": (EncryptionMethod.KERNEL,),
    "wireguard-go": (EncryptionMethod.USER_SPACE,),
}
_NEEDS = {
    EncryptionMethod.KERNEL: ("wireguard", "vxlan", "ipv6"),
    EncryptionMethod.USER_SPACE: ("wireguard-go", "tun", "vxlan", "ipv6"),
}
"""Features of the machine that each method needs.  ``ipv6``, because addresses inside the tunnels are IPv6."""


class EncryptionFeatures(Protocol):
    """Features of the machine (``node.host.features``)."""

    @property
    def missing(self) -> Mapping[str, str]:
        """Features that the machine lacks, with the reason."""


class EncryptionRefusal(msgspec.Struct, frozen=True):
    """This node cannot encrypt.  ``reason`` becomes part of the error of a task that needs encryption."""

    reason: str


def choose(features: EncryptionFeatures, setting: str = "auto") -> EncryptionMethod | EncryptionRefusal:
    """Choose the method.  ``setting`` is ``auto``, ``kernel`` or ``wireguard-go``."""
    for method in _ORDER[setting]:
        if not _lacking(features, method):
            return method
    return EncryptionRefusal(
        f"this node cannot encrypt overlay networks ({_reasons_against(features, _ORDER[setting])})"
    )


def reasons_for_fallback(features: EncryptionFeatures, setting: str = "auto") -> str:
    """Return why ``choose`` fell back to a later method.  Empty if it chose the first method, or none."""
    method, order = choose(features, setting), _ORDER[setting]
    return (
        _reasons_against(features, order[: order.index(method)])
        if isinstance(method, EncryptionMethod)
        else ""
    )


def _reasons_against(features: EncryptionFeatures, methods: Iterable[EncryptionMethod]) -> str:
    """Return which features that ``methods`` need are missing on this machine, with the kernel's errors."""
    lacking = {name: None for method in methods for name in _lacking(features, method)}
    return "; ".join(f"{name}: {features.missing[name]}" for name in lacking)


def _lacking(features: EncryptionFeatures, method: EncryptionMethod) -> list[str]:
    return [name for name in _NEEDS[method] if name in features.missing]
