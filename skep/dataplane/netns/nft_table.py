"""Skep's own nftables tables: their desired content as data, and the commands that create it."""

from collections.abc import Iterable

import msgspec

Element = tuple[str, str]
"""Name of a set or map, and one of its elements."""


class NftTable(msgspec.Struct, frozen=True, kw_only=True):
    """One table.

    Args:
        name: Family and name (``inet skep_overlay``).
        sets: Name and declaration of each set and map.
        chains: Name and hook of each chain.  The hook may be empty.
        rules: Chain and text of each rule.  The rules do not depend on the elements.
    """

    name: str
    sets: tuple[tuple[str, str], ...] = ()
    chains: tuple[tuple[str, str], ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    elements: frozenset[Element] = frozenset()


def whole(table: NftTable) -> str:
    """Return one transaction that creates the table and replaces an earlier one.

    If there is an earlier one, the kernel waits 5 to 20 ms until it is freed.
    """
    return absent(table.name) + fresh(table)


def fresh(table: NftTable) -> str:
    """Return commands that create the table, and fail if it exists."""
    lines = [f"create table {table.name}"]
    lines += [f"add set {table.name} {name} {{ {kind}; }}" for name, kind in table.sets if " : " not in kind]
    lines += [f"add map {table.name} {name} {{ {kind}; }}" for name, kind in table.sets if " : " in kind]
    lines += _chains(table.name, table.chains, table.rules)
    return "\n".join([*lines, *_added(table.name, table.elements), ""])


def absent(name: str) -> str:
    """Return commands that remove the table of this name if it exists."""
    return f"add table {name}\ndelete table {name}\n"


def trial(table: NftTable, elements: Iterable[Element]) -> str:
    """Return one transaction that fails if one of ``elements`` is refused, and changes nothing."""
    name = f"{table.name}_trial"
    sets = whole(NftTable(name=name, sets=table.sets, elements=frozenset(elements)))
    return f"{sets}delete table {name}\n"


def changes(old: NftTable, new: NftTable) -> str:
    """Return commands that change ``old`` into ``new``, or an empty text if they are equal.

    If only elements and additional chains differ, the existing rules stay, which takes a tenth of the time.
    """
    if not _extends(old, new):
        return whole(new)
    known = dict(old.chains)
    chains = [one for one in new.chains if one[0] not in known]
    lines = _chains(new.name, chains, [one for one in new.rules if one[0] not in known])
    gone: dict[str, list[str]] = {}
    for name, element in sorted(old.elements - new.elements):
        gone.setdefault(name, []).append(_key(name, element, new))
    lines += [f"delete element {new.name} {name} {{ {', '.join(keys)} }}" for name, keys in gone.items()]
    lines += _added(new.name, new.elements - old.elements)
    return "".join(f"{line}\n" for line in lines)


def with_spare_chains(old: NftTable, new: NftTable) -> NftTable:
    """Return ``new`` with the unused chains of ``old`` added, if that avoids writing the whole table.

    To remove a chain, the kernel waits 8 ms.
    """
    names = {name for name, _ in new.chains}
    spare = [(name, hook) for name, hook in old.chains if name not in names and not hook]
    kept = {name for name, _ in spare}
    rules = [one for one in old.rules if one[0] in kept]
    extended = msgspec.structs.replace(new, chains=(*new.chains, *spare), rules=(*new.rules, *rules))
    return extended if spare and _extends(old, extended) else new


def fits(listing: str, table: NftTable) -> bool:
    """Return whether a ``listing`` has as many rules and elements as ``table``, and so was completely written.

    The texts cannot be compared, because nft spells rules in its own way.
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


def _chains(table: str, chains: Iterable[tuple[str, str]], rules: Iterable[tuple[str, str]]) -> list[str]:
    lines = [f"add chain {table} {name} {hook}".rstrip() for name, hook in chains]
    return lines + [f"add rule {table} {chain} {rule}" for chain, rule in rules]


def _key(name: str, element: str, table: NftTable) -> str:
    """Return the part of an element that identifies it for deletion.  For a map, this is the key."""
    return element.rpartition(" : ")[0] if " : " in dict(table.sets)[name] else element


def _extends(old: NftTable, new: NftTable) -> bool:
    """Return whether ``new`` differs from ``old`` in elements and additional chains only."""
    known = dict(old.chains)
    if old.sets != new.sets or not known.items() <= dict(new.chains).items():
        return False
    return _by_chain(old.rules) == {
        chain: rules for chain, rules in _by_chain(new.rules).items() if chain in known
    }


def _by_chain(rules: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for chain, rule in rules:
        found.setdefault(chain, []).append(rule)
    return found
