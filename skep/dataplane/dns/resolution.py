"""Resolves a query by the network tables.  Pure.

A name is looked up in the container's networks in their order.  It is first looked up unchanged, then with its last
labels as the name of a network: ``web.front`` is ``web`` on ``front``.  The first network that has the name decides
about all record types, and the name is never forwarded.  There is one exception: if the name has only addresses of the
other IP version there, the next network that has the name is used.  Source: moby, libnetwork/sandbox.go (ResolveName).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import msgspec

from skep.dataplane.dns.index import Index, NameRecord
from skep.model.networks.dns_messages import AAAA, ANY, IN, PTR, SRV, A, Query, Record, encoded, key
from skep.model.values.ids import NetworkId, ServiceId

T = TypeVar("T")

TTL_S = 1
"""Time to live of answers in seconds.

With Docker's 600, programs use stale addresses.  A stopping task keeps running for the drain time of its service (1 s
by default), so cached answers stay correct.
"""
_SERVICE_PORT = re.compile(r"_([0-9]{1,5})\._(?:tcp|udp|sctp)\.(.+)")
_REVERSE_IPV4, _REVERSE_IPV6 = ".in-addr.arpa", ".ip6.arpa"


class FoundName(msgspec.Struct, frozen=True):
    """The name is in a network.  Without ``answers``, it has no record of the queried type.

    ``virtual`` has the services whose virtual addresses are in the response, with their networks.
    """

    answers: tuple[Record, ...] = ()
    extra: tuple[Record, ...] = ()
    virtual: frozenset[tuple[NetworkId, ServiceId]] = frozenset()


class Missing(msgspec.Struct, frozen=True):
    """The name can only belong to a network of the container, and does not exist there."""


class Foreign(msgspec.Struct, frozen=True):
    """The name is in no network of the container and may be forwarded.

    ``is_single_label`` names cannot exist in the public DNS.
    """

    is_single_label: bool


Decision: TypeAlias = FoundName | Missing | Foreign


Links: TypeAlias = Mapping[NetworkId, Mapping[str, str]]
"""One container's own aliases for other containers: by network, the name for each alias."""


def links_of(links: Sequence[str]) -> Mapping[str, str]:
    """Parse ``container:alias`` into a mapping from alias to container.

    Without an alias, the container's name is used.
    """
    pairs = (link.removeprefix("/").partition(":") for link in links)
    return {key(alias or name): key(name) for name, _, alias in pairs}


def decide(
    query: Query, networks: Sequence[Index], rng: float, links: Links = MappingProxyType({})
) -> Decision:
    """Decide how to respond to ``query`` of a container on ``networks``, in the container's order.

    ``rng`` (0 to 1) selects which of several addresses comes first.
    """
    name = query.name
    foreign = Foreign("." not in name and name != "")
    if query.class_ != IN:
        return foreign
    if query.type == PTR or name.endswith((_REVERSE_IPV4, _REVERSE_IPV6)):
        return _reverse(query, networks) or foreign
    other_version: FoundName | None = None
    for index, local in _candidates(name, networks):
        known = index.find(links.get(index.id, {}).get(local, local))
        if known is not None:
            found = _addresses(query.type, index.id, known, rng)
            if not _has_other_version_only(query.type, known):
                return found
            other_version = other_version or found
            continue
        if other_version is not None:
            continue
        if query.type == SRV:
            targets = _targets(local, index, rng)
            if targets is not None:
                return targets
        slot, _, service = local.partition(".")
        if slot.isdecimal() and index.is_service(service):
            return Missing()
    return other_version or foreign


def _has_other_version_only(type_: int, known: NameRecord) -> bool:
    """Return whether ``known`` has only addresses of the IP version that was not queried."""
    return (type_ == AAAA and bool(known.ipv4) and not known.ipv6) or (
        type_ == A and bool(known.ipv6) and not known.ipv4
    )


def _candidates(name: str, networks: Sequence[Index]) -> Iterator[tuple[Index, str]]:
    """Yield each network that may have ``name``, and the name to look up there."""
    for index in networks:
        yield index, name
    end = name.rfind(".")
    while end > 0:
        for index in networks:
            if index.name == name[end + 1 :]:
                yield index, name[:end]
        end = name.rfind(".", 0, end)


def _addresses(type_: int, network: NetworkId, known: NameRecord, rng: float) -> FoundName:
    records: list[Record] = []
    if type_ in (A, ANY):
        records += [Record(A, packed) for packed in rotated(known.ipv4, rng)]
    if type_ in (AAAA, ANY):
        records += [Record(AAAA, packed) for packed in rotated(known.ipv6, rng)]
    virtual = frozenset((network, service) for service in known.services) if records else frozenset()
    return FoundName(tuple(records), virtual=virtual)


def _reverse(query: Query, networks: Sequence[Index]) -> FoundName | Missing | None:
    address = reversed_address(query.name)
    if address is None:
        return None
    for index in networks:
        found = index.reverse.get(str(address))
        if found is not None:
            name, service = found
            if query.type not in (PTR, ANY):
                return FoundName()
            try:
                record = Record(PTR, encoded(f"{name}.{index.name}"))
            except ValueError:
                return FoundName()
            return FoundName((record,), virtual=frozenset({(index.id, service)}) if service else frozenset())
    if any(address in subnet for index in networks for subnet in index.subnets):
        return Missing()
    return None


def _targets(name: str, index: Index, rng: float) -> FoundName | None:
    """Return the SRV answer for ``_<port>._<protocol>.<service>``, or None for another kind of name."""
    matched = _SERVICE_PORT.fullmatch(name)
    if matched is None:
        return None
    port = int(matched[1])
    if not index.is_service(matched[2]) or not 0 < port <= 65535:
        return None
    answers, extra = [], []
    for task in rotated(tuple(index.serving(matched[2])), rng):
        try:
            target = encoded(f"{task.name}.{index.name}")
        except ValueError:
            continue
        answers.append(Record(SRV, b"\0\0\0\0" + port.to_bytes(2, "big") + target))
        extra += [
            Record(A if address.version == 4 else AAAA, address.packed, target)
            for address in map(ip_address, task.addresses)
        ]
    return FoundName(tuple(answers), tuple(extra))


def rotated(values: tuple[T, ...], rng: float) -> tuple[T, ...]:
    """Return ``values`` rotated, so that the one at the share ``rng`` (0 to 1) comes first."""
    start = int(rng * len(values))
    return values[start:] + values[:start]


def reversed_address(name: str) -> IPv4Address | IPv6Address | None:
    """Return the address of a name below in-addr.arpa or ip6.arpa, or None if it is not a complete address."""
    try:
        if name.endswith(_REVERSE_IPV4):
            return IPv4Address(".".join(reversed(name.removesuffix(_REVERSE_IPV4).split("."))))
        if name.endswith(_REVERSE_IPV6):
            digits = name.removesuffix(_REVERSE_IPV6).split(".")
            if len(digits) == 32 and all(len(digit) == 1 for digit in digits):
                return IPv6Address(bytes.fromhex("".join(reversed(digits))))
    except ValueError:
        pass
    return None
