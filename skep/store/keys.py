"""How keys are spelled in the store.  The etcd side puts its prefix before them; nothing else knows another form.

::

    o/<kind>/<id>                  the head of an object: the wish, and what only changes with it
    o/<kind>/<id>.<part>           another part, with a writer of its own
    n/<kind>/<name>                a unique name, p/<protocol>/<port> a published port: the value names the owner
    v/<vxlan id>, i/<subnet>       what the leader gave a network, in the same form
    s/<claim>/<kind>/<id>          a shared hold on a claim (host-mode ports): bars the exclusive claim
    r/<kind>/<id>/<kind>/<id>      a reference: the second object uses the first
    meta/format, meta/level        what this data is, and the lowest version among the managers
    meta/incarnation               which life of the cluster this is: raised by every restore and forced new cluster
    leader                         the fence of the leader's writes
    w/<node id>                    a manager's ticket: moving it voids that manager's writes in flight
    w/<node id>/<number>           what that manager writes beside deletions, to know them for its own
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
"""The part that holds everything which no other part holds."""


def object_key(kind: str, id: str, part: str = HEAD) -> str:
    """The key of one part of an object."""
    return part_key(f"o/{kind}/{id}", part)


def part_key(head_key: str, part: str) -> str:
    """The key of another part of the object with this head."""
    return f"{head_key}.{part}" if part else head_key


def parsed_object_key(key: str) -> tuple[str, str, str]:
    """``(kind, id, part)`` of an ``o/`` key."""
    head, _, part = parted(key)
    return *parsed_head_key(head), part


parted: Callable[[str], tuple[str, str, str]] = methodcaller("partition", ".")
"""The key of its object's head, the full stop, and the part of an ``o/`` key.

Object ids hold no full stop, so the first one ends the id; without one it is the head's own key.
"""


def parsed_head_key(head: str) -> tuple[str, str]:
    """``(kind, id)`` of the key of a head."""
    _, kind, id = head.split("/", 2)
    return kind, id


def name_claim(kind: str, name: str) -> str:
    """The claim on a name; names are unique without regard to case, as in SwarmKit's store."""
    return f"n/{kind}/{quote(name.lower(), safe='')}"


def port_claim(protocol: str, port: int) -> str:
    """The claim on a published port of the whole cluster."""
    return f"p/{quote(protocol, safe='')}/{port}"


def vxlan_claim(vxlan_id: int) -> str:
    """The claim on a VXLAN id."""
    return f"v/{vxlan_id}"


def subnet_claim(subnet: str) -> str:
    """The claim on a subnet, as ``ipaddress`` spells it."""
    return f"i/{quote(subnet, safe='')}"


CLAIMS: Final = frozenset({"n/", "p/", "v/", "i/"})
"""How claims begin."""


def shared_key(claim: str, kind: str, id: str) -> str:
    """The key by which an object shares ``claim`` with others."""
    return f"s/{claim}/{kind}/{id}"


def shared_prefix(claim: str) -> str:
    """What all shared holds on ``claim`` begin with."""
    return f"s/{claim}/"


def parsed_shared_key(key: str) -> tuple[str, tuple[str, str]]:
    """``(claim, (kind, id))`` of an ``s/`` key."""
    _, first, second, third, kind, id = key.split("/", 5)
    return f"{first}/{second}/{third}", (kind, id)


def reference_key(used: tuple[str, str], user: tuple[str, str]) -> str:
    """The key that says ``user`` needs ``used``; both are (kind, id)."""
    return f"r/{used[0]}/{used[1]}/{user[0]}/{user[1]}"


def reference_prefix(kind: str, id: str) -> str:
    """What all references to one object begin with."""
    return f"r/{kind}/{id}/"


def parsed_reference_key(key: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """``(used, user)`` of an ``r/`` key."""
    _, used_kind, used_id, kind, id = key.split("/", 4)
    return (used_kind, used_id), (kind, id)


def ticket_key(node_id: str) -> str:
    """The key whose revision every write of this manager compares."""
    return f"w/{node_id}"


def covering_prefix(key: str) -> str | None:
    """The prefix whose emptiness a writer of ``key`` disturbs, or None: no range over such keys is ever compared."""
    if key.startswith("r/"):
        _, kind, id, _ = key.split("/", 3)
        return reference_prefix(kind, id)
    if key.startswith("s/"):
        return shared_prefix(parsed_shared_key(key)[0])
    return None
