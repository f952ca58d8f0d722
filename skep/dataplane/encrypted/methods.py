"""How this node encrypts: the first method that works here, or a refusal.  Never plain text.

The order is that of the project: kernel WireGuard, then the path in user space.  What the kernel can do was found out
by doing it (``node.features``).  A method that never passed its test on any machine is not chosen by itself
(docs/untested.md): it is taken once that page names where it passed, or when the configuration asks for it.
"""

from collections.abc import Mapping

import msgspec

from skep.model.pair_keys import ENCRYPTION_LABEL, Method
from skep.node.features import Features

HAS_WIREGUARD_PASSED = False
"""Whether docs/untested.md names a machine on which kernel WireGuard passed; a test compares the two."""

_NEEDS = {Method.WIREGUARD: ("wireguard", "vxlan"), Method.USER_SPACE: ("encrypted-tap",)}


class Refusal(msgspec.Struct, frozen=True):
    """This node does not encrypt; ``reason`` goes into the status of the task that wants it to."""

    reason: str


def chosen(features: Features, *, wished: Method | None = None) -> Method | Refusal:
    """What this node says of itself, and does.  ``wished``: this one or none."""
    order = (wished,) if wished is not None else tuple(Method)
    reasons = []
    for method in order:
        lacking = [name for name in _NEEDS[method] if not features.has(name)]
        if not lacking and (wished is not None or method is not Method.WIREGUARD or HAS_WIREGUARD_PASSED):
            return method
        reasons += [f"{name}: {features.missing[name]}" for name in lacking]
    return Refusal("this node cannot encrypt overlay networks (" + "; ".join(reasons) + ")")


def label(method: Method | Refusal) -> Mapping[str, str]:
    """What the node says of it: managers have both ends of a pair do the same."""
    return {ENCRYPTION_LABEL: method.value} if isinstance(method, Method) else {}


def refusal_for(network: str, method: Method | Refusal) -> str:
    """What a task on the encrypted ``network`` is told; empty: it may come."""
    if isinstance(method, Method):
        return ""
    return f"network {network} is encrypted, and {method.reason}; nothing is sent in clear"
