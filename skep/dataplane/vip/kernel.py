"""Writes a plan into the namespace of the calling thread."""

import structlog

from skep.dataplane.netns import nft
from skep.dataplane.vip import rules
from skep.dataplane.vip.conntrack import forget_flows
from skep.dataplane.vip.elements import ElementSocket
from skep.dataplane.vip.healing import named
from skep.dataplane.vip.plan import Plan
from skep.dataplane.vip.wanted import Leads, is_ipv6

log = structlog.get_logger()


def write_text(own_name: str, text: str) -> None:
    """Apply rules under ``own_name``.  Blocks.  Raises: NftFailed."""
    with named(own_name):
        nft.run(text)


def write(own_name: str, plan: Plan, elements: ElementSocket) -> None:
    """Apply ``plan`` under ``own_name`` (see ``healing``).  Blocks.  Raises: NftFailed, OSError.

    ``elements``: of this namespace.
    """
    with named(own_name):
        if plan.elements is None:
            nft.run(plan.text)
        else:
            elements.change(plan.elements)
        if not plan.astray:
            return
        if plan.is_anew:
            nft.run(rules.noted(_forget(plan.astray)))
            return
        families = sorted({rules.FAMILIES[is_ipv6(one)] for one in plan.astray})
        used = frozenset(one for family in families for one in elements.datagrams(family))
        if astray := {one: backends for one, backends in plan.astray.items() if one in used}:
            _forget(astray)


def _forget(leads: Leads) -> frozenset[str]:
    """To which addresses of ``leads`` there are UDP flows, as far as that can be known; those astray are gone."""
    try:
        return forget_flows(leads)
    except OSError as error:  # new connections are led rightly all the same
        log.warning("connection tracking does not answer", reason=str(error))
        return frozenset(leads)
