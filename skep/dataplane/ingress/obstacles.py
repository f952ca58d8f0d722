"""Firewalls of the machine that stop what is led to containers.  Pure.

A packet passes nftables only if every base chain lets it pass: an accept in our table overrides no drop in another's,
and others' tables are theirs.  So a firewall that forbids forwarding needs an exception, which Docker's
iptables rules make by themselves (it writes into the chain that forbids).
"""

import re
from collections.abc import Iterable

OUR_TABLES = frozenset({"ip skep", "ip6 skep", "ip skep_ingress", "ip6 skep_ingress", "inet skep_overlay"})
_TABLE = re.compile(r"table (\S+ \S+) {")
_HOOK = re.compile(r"type filter hook forward priority [^;]+; policy (accept|drop);")
_LAST_WORD = re.compile(r"\s*(?:counter packets \d+ bytes \d+ )?(?:drop|reject\b.*)")


def forwarding_tables(chains: str) -> tuple[str, ...]:
    """Others' tables that have a say in forwarding, from ``nft list chains``."""
    return tuple(dict.fromkeys(table for table, body in _tables(chains) if _HOOK.search(body)))


def obstacles(tables: Iterable[str], bridges: Iterable[str]) -> tuple[str, ...]:
    """Sentences on those of others' ``tables`` (``nft list table``, each) that forbid forwarding to ``bridges``.

    One that names a bridge of ours is believed to make an exception for it.
    """
    names = tuple(bridges)
    found = []
    for text in tables:
        for table, body in _tables(text):
            chain = _forbidding_chain(body)
            missing = [name for name in names if name not in body]
            if chain and missing:
                found.append(
                    f"chain {chain} of nftables table {table} forbids forwarding: published ports lead nowhere until "
                    f"it accepts packets to and from {' and '.join(missing)}"
                )
    return tuple(found)


def _tables(text: str) -> Iterable[tuple[str, str]]:
    for part in re.split(r"(?m)^(?=table )", text):
        match = _TABLE.match(part)
        if match is not None and match[1] not in OUR_TABLES:
            yield match[1], part


def _forbidding_chain(body: str) -> str:
    """The chain at the forward hook that drops or rejects what no rule of it accepted; empty: there is none."""
    for part in re.split(r"(?m)^\tchain ", body)[1:]:
        hook = _HOOK.search(part)
        rules = [line for line in part.splitlines()[1:] if line.startswith("\t\t")]
        if hook is not None and (hook[1] == "drop" or _LAST_WORD.fullmatch(rules[-1])):
            return part.partition(" ")[0]
    return ""
