"""nftables tables of our own: what one has to hold, as data, and the text that brings it about."""

from collections.abc import Iterable

import msgspec

Element = tuple[str, str]
"""Name of a set or map, and an element of it."""


class NftTable(msgspec.Struct, frozen=True, kw_only=True):
    """One table.  ``name``: with its family (``inet skep_overlay``).

    ``sets``: what declares the sets and maps, ``chains`` the chains, ``rules`` the rules of each (chain, rule); none of
    them depends on what the sets hold.
    """

    name: str
    sets: tuple[tuple[str, str], ...] = ()
    chains: tuple[tuple[str, str], ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    elements: frozenset[Element] = frozenset()


def whole(table: NftTable) -> str:
    """The table, whatever it was before, as one transaction."""
    lines = [f"add table {table.name}", f"delete table {table.name}", f"add table {table.name}"]
    lines += [f"add set {table.name} {name} {{ {kind}; }}" for name, kind in table.sets if " : " not in kind]
    lines += [f"add map {table.name} {name} {{ {kind}; }}" for name, kind in table.sets if " : " in kind]
    lines += [f"add chain {table.name} {name} {hook}".rstrip() for name, hook in table.chains]
    lines += [f"add rule {table.name} {chain} {rule}" for chain, rule in table.rules]
    return "\n".join([*lines, *_added(table.name, table.elements), ""])


def trial(table: NftTable, elements: Iterable[Element]) -> str:
    """One transaction that is refused if one of ``elements`` is, and changes nothing."""
    name = f"{table.name}_trial"
    sets = whole(NftTable(name=name, sets=table.sets, elements=frozenset(elements)))
    return f"{sets}delete table {name}\n"


def changes(old: NftTable, new: NftTable) -> str:
    """What makes ``old`` into ``new``: elements alone where nothing else differs; empty: nothing."""
    if msgspec.structs.replace(old, elements=new.elements) != new:
        return whole(new)
    lines = [
        f"delete element {new.name} {name} {{ {element.partition(' : ')[0]} }}"
        for name, element in sorted(old.elements - new.elements)
    ]
    lines += _added(new.name, new.elements - old.elements)
    return "".join(f"{line}\n" for line in lines)


def fits(listing: str, table: NftTable) -> bool:
    """Whether nft's ``listing`` has as many rules and elements as ``table``: what we have just written is whole.

    The spelling is nft's own, so it is compared with an earlier listing only.
    """
    rules, elements, is_chain = 0, 0, False
    for line in (one.strip() for one in listing.splitlines()):
        if line.startswith("chain "):
            is_chain = True
        elif line == "}":
            is_chain = False
        elif is_chain and not line.startswith("type "):
            rules += 1
    for part in listing.split("elements = {")[1:]:
        elements += part.partition("}")[0].count(",") + 1
    return (rules, elements) == (len(table.rules), len(table.elements))


def _added(table: str, elements: Iterable[Element]) -> list[str]:
    by_set: dict[str, list[str]] = {}
    for name, element in sorted(elements):
        by_set.setdefault(name, []).append(element)
    return [f"add element {table} {name} {{ {', '.join(found)} }}" for name, found in by_set.items()]
