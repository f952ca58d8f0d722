"""Names and addresses of a playground's nodes and resources.  No I/O.

Names of playgrounds and nodes are single words without ``-``, so ``skep-<playground>-<node>`` is unambiguous: ``down``
of the playground ``a`` never touches one called ``ab``.
"""

import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from skep.errors import FailedPrecondition, InvalidArgument

Role = Literal["manager", "worker"]
Engine = Literal["skep", "docker"]

DEFAULT = "playground"

SWITCH = "net"
"""Name of the namespace with the bridges, which routes between the subnets.  No node can have this name."""

CGROUP_TOP = "skep-playground"
UNDERLAY = "192.168.0.0/16"
"""The range of all subnets of a playground."""
_WORD = re.compile(r"[a-z][a-z0-9]{0,15}")
# Last bytes of the nodes' addresses.  The router of a subnet has a lower one.
_FIRST_HOST = 11
_LAST_HOST = 250
SUBNETS_MAX = 50
"""Limit for the subnets of one playground, because the subnet's number is a byte of the addresses."""


def check_name(name: str) -> str:
    """Return ``name`` if it is valid for a playground or a node.  Raises: InvalidArgument."""
    if not _WORD.fullmatch(name) or name == SWITCH:
        raise InvalidArgument(
            f"{name!r} is not a valid name. Use up to 16 lower-case letters and digits, starting with a letter."
        )
    return name


def namespace(playground: str, node: str) -> str:
    """Return the network namespace of one node, as ``ip netns`` shows it."""
    return f"skep-{playground}-{node}"


def node_of_namespace(playground: str, namespace: str) -> str | None:
    """Return the node of ``playground`` that owns the namespace, if any (``SWITCH`` counts as one)."""
    match = re.fullmatch(rf"skep-{re.escape(playground)}-([a-z0-9]+)", namespace)
    return match[1] if match else None


def cgroup(playground: str, node: str) -> str:
    """Return a node's cgroup below ``/sys/fs/cgroup[/controller]``.

    The daemon is in the child ``agent``, and containers are in the child ``ctr``.
    """
    return f"{CGROUP_TOP}/{playground}-{node}"


def node_of_cgroup(playground: str, directory: str) -> str | None:
    """Return the node of ``playground`` that owns a directory below ``CGROUP_TOP``, if any."""
    prefix, _, node = directory.partition("-")
    return node if prefix == playground and node else None


def port(node: str) -> str:
    """Return the name of the node's interface at the switch.  It has at most 15 characters, the kernel's limit."""
    return f"v{node}"[:15]


class UnderlayAddress(msgspec.Struct, frozen=True, kw_only=True):
    """A node's address on the underlay."""

    subnet: int
    host: int

    @property
    def ip(self) -> str:
        """The address as ``192.168.<100 + subnet>.<host>``."""
        return f"192.168.{100 + self.subnet}.{self.host}"

    @property
    def gateway(self) -> str:
        """Address of the switch, which routes between the subnets."""
        return f"192.168.{100 + self.subnet}.1"


def address_of(ip: str) -> UnderlayAddress:
    """Parse an address that ``UnderlayAddress.ip`` returned."""
    _, _, subnet, host = ip.split(".")
    return UnderlayAddress(subnet=int(subnet) - 100, host=int(host))


def free_address(taken: Iterable[str], subnets: int) -> UnderlayAddress:
    """Return an address that is not in ``taken``.  Nodes are spread over the subnets in turn.

    Raises: FailedPrecondition: every subnet is full.
    """
    used = set(taken)
    for index in range(subnets * (_LAST_HOST - _FIRST_HOST + 1)):
        address = UnderlayAddress(subnet=index % subnets, host=_FIRST_HOST + index // subnets)
        if address.ip not in used:
            return address
    raise FailedPrecondition("The playground's networks are full. Use more --subnets.")


def free_name(role: Role, taken: Iterable[str], engine: Engine = "skep") -> str:
    """Return the lowest free name: m1, ... for managers, w1, ... for workers, d1, ... for docker nodes."""
    used = set(taken)
    number = 1
    letter = "d" if engine == "docker" else role[0]
    while (name := f"{letter}{number}") in used:
        number += 1
    return name
