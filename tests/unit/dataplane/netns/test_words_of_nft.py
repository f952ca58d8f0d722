"""Names of chains, sets and maps: none may be a word of nft's language, and each version adds some."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.dataplane.plan import packet_filter
from tests.support.harness.sources import parsed

PACKAGE = Path(packet_filter.__file__).parents[2]
# Those that one would think of for a name; the last three are words since 1.0.8, and names with an older nft.
# (The names of hooks are none.)
WORDS = frozenset(
    {
        "accept",
        "add",
        "chain",
        "counter",
        "daddr",
        "delete",
        "dnat",
        "drop",
        "dynamic",
        "element",
        "flow",
        "host",
    }
    | {
        "insert",
        "jump",
        "label",
        "last",
        "limit",
        "log",
        "map",
        "mark",
        "masquerade",
        "meta",
        "packets",
        "policy",
    }
    | {
        "protocol",
        "queue",
        "quota",
        "redirect",
        "reject",
        "reset",
        "return",
        "rule",
        "saddr",
        "set",
        "size",
        "snat",
    }
    | {"socket", "table", "timeout", "tproxy", "update", "verdict", "vlan", "geneve", "gre", "vxlan"}
)
_ADDED = re.compile(r"add (?:chain|set|map) \{?[^ {}]*\}? ([a-z][a-z0-9_]*)")


def _names(path: Path) -> Iterator[str]:
    """Of ``NftTable(...)`` calls and of texts with ``add chain TABLE NAME`` and the like."""
    text = path.read_text()
    yield from _ADDED.findall(text)
    if "NftTable(" not in text:
        return  # parsing all files takes seconds, in every process that collects tests
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "NftTable":
            for word in node.keywords:
                if word.arg in ("chains", "sets") and isinstance(word.value, ast.Tuple):
                    firsts = [row.elts[0] for row in word.value.elts if isinstance(row, ast.Tuple)]
                    yield from (str(first.value) for first in firsts if isinstance(first, ast.Constant))


SOURCES = {
    str(path.relative_to(PACKAGE)): found
    for path in sorted(PACKAGE.rglob("*.py"))
    if (found := frozenset(_names(path)))
}


@pytest.mark.parametrize("path", SOURCES)
def test_no_name_is_a_word_of_nft(path: str) -> None:
    assert SOURCES[path] & WORDS == frozenset()


def test_the_names_are_found() -> None:
    assert {"from_peers", "arriving", "peers4"} <= SOURCES["dataplane/plan/packet_filter.py"]
    assert {"backends", "services", "known"} <= SOURCES["dataplane/plan/vip.py"]
