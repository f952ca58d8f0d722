"""Writes a plan into the namespace of the calling thread."""

from skep.node.network import nft
from skep.node.virtual import rules
from skep.node.virtual.conntrack import forget_flows
from skep.node.virtual.healing import named
from skep.node.virtual.plan import Plan
from skep.node.virtual.wanted import is_ipv6


def write(own_name: str, plan: Plan) -> None:
    """Apply ``plan`` under ``own_name`` (see ``healing``).  Blocks.  Raises: NftFailed, OSError."""
    with named(own_name):
        nft.run(plan.text)
        if not plan.astray:
            return
        if plan.is_anew:
            nft.run(rules.noted(forget_flows(plan.astray)))
            return
        families = sorted({rules.FAMILIES[is_ipv6(one)] for one in plan.astray})
        used = rules.noted_in("".join(nft.run(rules.datagrams(family)) for family in families))
        if astray := {one: backends for one, backends in plan.astray.items() if one in used}:
            forget_flows(astray)
