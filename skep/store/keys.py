"""The keys of the store.  In etcd they have a prefix (``etcd.requests.PREFIX``).

::

    o/<kind>/<id>                  the head of an object: its spec, and fields that only change with it
    o/<kind>/<id>.<part>           another part, with one writer
    n/<kind>/<name>                a unique name, p/<protocol>/<port> a published port: the value names the owner
    v/<vxlan id>, i/<subnet>       what the leader allocated to a network, in the same form
    s/<claim>/<kind>/<id>          a shared claim (host-mode ports), which excludes the exclusive one
    r/<kind>/<id>/<kind>/<id>      a reference: the second object uses the first
    meta/format, meta/level        the layout of the data, and the lowest feature level among the managers
    meta/incarnation               counts restores and forced new clusters
    leader                         the fence of the leader's writes
    w/<node id>                    a manager's writer epoch: advancing it voids that manager's writes in flight
    w/<node id>/<number>           markers, which that manager writes with deletions to recognize them in the watch
"""

from collections.abc import Callable
from operator import methodcaller
from typing import Final
from urllib.parse import quote

LEADER: Final = "leader"
FORMAT: Final = "meta/format"
LEVEL: Final = "meta/level"
KEY_RING: Final = "meta/keys"
INCARNATION: Final = "meta/incarnation"

HEAD: Final = ""
"""Name of the part with the fields that are in no other part."""


def object_key(kind: str, id: str, part: str = HEAD) -> str:
    """Return the key of one part of an object."""
    return part_key(f"o/{kind}/{id}", part)


def part_key(head_key: str, part: str) -> str:
    """Return the key of a part of the object with this head key."""
    return f"{head_key}.{part}" if part else head_key


def kind_prefix(kind: str) -> str:
    """Return the prefix of all objects of a kind."""
    return f"o/{kind}/"


KINDS_COMPARED: Final = frozenset({"network", "service"})
"""Kinds of which a transaction may compare all objects (``Transaction.rely_on_all``)."""

_COMPARED: Final = tuple(sorted(map(kind_prefix, KINDS_COMPARED)))


def parsed_object_key(key: str) -> tuple[str, str, str]:
    """Return ``(kind, id, part)`` of an ``o/`` key."""
    head, _, part = parted(key)
    return *parsed_head_key(head), part


parted: Callable[[str], tuple[str, str, str]] = methodcaller("partition", ".")
"""Splits an ``o/`` key into the key of the object's head, the full stop, and the part.

Object ids contain no full stop, so the first full stop ends the id.  Without one, the key is the head's own key.
"""


def parsed_head_key(head: str) -> tuple[str, str]:
    """Return ``(kind, id)`` of a head's key."""
    _, kind, id = head.split("/", 2)
    return kind, id


def name_claim(kind: str, name: str) -> str:
    """Return the claim on a name.  Names are unique regardless of case, as in SwarmKit's store."""
    return f"n/{kind}/{quote(name.lower(), safe='')}"


def port_claim(protocol: str, port: int) -> str:
    """Return the claim on a published port of the whole cluster."""
    return f"p/{quote(protocol, safe='')}/{port}"


def vxlan_claim(vxlan_id: int) -> str:
    """Return the claim on a VXLAN id."""
    return f"v/{vxlan_id}"


def subnet_claim(subnet: str) -> str:
    """Return the claim on a subnet, as ``ipaddress`` spells it."""
    return f"i/{quote(subnet, safe='')}"


CLAIMS: Final = frozenset({"n/", "p/", "v/", "i/"})
"""Prefixes of claims."""


def shared_key(claim: str, kind: str, id: str) -> str:
    """Return the key by which an object shares ``claim`` with others."""
    return f"s/{claim}/{kind}/{id}"


def shared_prefix(claim: str) -> str:
    """Return the prefix of all shared holds of ``claim``."""
    return f"s/{claim}/"


def parsed_shared_key(key: str) -> tuple[str, tuple[str, str]]:
    """Return ``(claim, (kind, id))`` of an ``s/`` key."""
    _, first, second, third, kind, id = key.split("/", 5)
    return f"{first}/{second}/{third}", (kind, id)


def reference_key(used: tuple[str, str], user: tuple[str, str]) -> str:
    """Return the key of the reference of ``user`` to ``used``.  Both are (kind, id)."""
    return f"r/{used[0]}/{used[1]}/{user[0]}/{user[1]}"


def reference_prefix(kind: str, id: str) -> str:
    """Return the prefix of all references to one object."""
    return f"r/{kind}/{id}/"


def parsed_reference_key(key: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return ``(used, user)`` of an ``r/`` key."""
    _, used_kind, used_id, kind, id = key.split("/", 4)
    return (used_kind, used_id), (kind, id)


def writer_epoch_key(node_id: str) -> str:
    """Return the key whose revision every write of this manager compares."""
    return f"w/{node_id}"


def covering_prefix(key: str) -> str | None:
    """Return the prefix whose range compare fails if ``key`` is written, or None if no compare has such a range."""
    if key.startswith("r/"):
        _, kind, id, _ = key.split("/", 3)
        return reference_prefix(kind, id)
    if key.startswith("s/"):
        return shared_prefix(parsed_shared_key(key)[0])
    return kind_prefix(key.split("/", 2)[1]) if key.startswith(_COMPARED) else None
