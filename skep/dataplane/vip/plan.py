"""What to write so that a namespace leads virtual addresses as wanted: the difference to what it has, pure."""

from collections.abc import Mapping

import msgspec

from skep.dataplane.vip import rules
from skep.dataplane.vip.wanted import Leads, placed


class Rules(msgspec.Struct, frozen=True):
    """One family's table as it was written: where addresses lead, and for which counts there are chains."""

    leads: Leads
    counts: frozenset[int]


There = Mapping[str, Rules]
"""The tables of a namespace by family."""


class Plan(msgspec.Struct, frozen=True):
    """``text``: the rules, as one transaction.

    ``elements``: the same, where it changes nothing but elements of maps; None: it changes more.  Most changes of
    backends are such, and need not be told in nftables' language.

    ``astray``: addresses to which UDP flows may lead elsewhere now, with their backends; ``is_anew``: and nobody
    knows to which of them there are any.
    """

    text: str
    elements: tuple[rules.Elements, ...] | None
    after: There
    astray: Leads
    is_anew: bool


def plan(there: There | None, leads: Leads) -> Plan:
    """How a namespace with ``there`` (None: nobody knows) comes to ``leads``.

    A namespace without virtual addresses of a family needs no table for it.
    """
    texts = []
    elements: list[rules.Elements] = []
    has_more = False
    after: dict[str, Rules] = {}
    astray: dict[str, tuple[str, ...]] = {}
    for family in rules.FAMILIES:
        new = rules.of_family(leads, family)
        old = None if there is None else there.get(family)
        if old is not None:
            new = {address: placed(old.leads.get(address, ()), backends) for address, backends in new.items()}
            texts.append(rules.changes(family, old.leads, new, old.counts))
            elements += rules.elements(family, old.leads, new)
            has_more |= not rules.counts_of(new) <= old.counts
            after[family] = Rules(new, old.counts | rules.counts_of(new))
            for address, backends in old.leads.items():
                if set(backends) - set(new.get(address, ())):
                    astray[address] = new.get(address, ())
        elif new:
            has_more = True
            texts.append(rules.fresh(family, new) if there is not None else rules.whole(family, new))
            after[family] = Rules(new, rules.counts_of(new))
            if there is None:
                astray.update(new)
        elif there is None:
            has_more = True
            texts.append(rules.removed(family))
    return Plan("".join(texts), None if has_more else tuple(elements), after, astray, there is None)
