"""Affinity between services: labels that place a service's tasks near the tasks of other services, or apart from them.

A value is ``NAME[@TOPOLOGY]`` for each other service, separated by commas.  The topology is ``node`` (the default), or
a label such as ``node.labels.zone``, whose nodes with equal values form a *domain*.  Names are service names and not
ids, as in ``skep.depends-on``, and may be the service's own name.

Source: kubernetes, pod affinity and topology spread constraints (the rules that count, and that a node without the
label belongs to no domain).
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from skep.errors import InvalidArgument

NODE_LABEL: Final = "node.labels."
ENGINE_LABEL: Final = "engine.labels."
AFFINITY: Final = "skep.affinity"
ANTI_AFFINITY: Final = "skep.anti-affinity"
AFFINITY_PREFERRED: Final = "skep.affinity.preferred"
ANTI_AFFINITY_PREFERRED: Final = "skep.anti-affinity.preferred"
MAX_SKEW: Final = "skep.max-skew"
AFFINITY_LABELS: Final = (AFFINITY, ANTI_AFFINITY, AFFINITY_PREFERRED, ANTI_AFFINITY_PREFERRED)
PLACEMENT_LABELS: Final = (*AFFINITY_LABELS, MAX_SKEW)

TERMS_MAX: Final = 20
"""Most services in one label, because each decision of the scheduler checks each of them."""
SKEW_MAX: Final = 1000
"""Largest skew.  With more, the label would have no effect on services of usual size."""
_NODE: Final = "node"


class AffinityTerm(msgspec.Struct, frozen=True):
    """Another service, and the topology.  An empty topology means single nodes."""

    service: str
    topology: str = ""

    @property
    def key(self) -> str:
        """The service's name in lower case.  Names that differ only in case are equal."""
        return self.service.lower()

    @property
    def text(self) -> str:
        """The term as it is written in the label."""
        return f"{self.service}@{self.topology}" if self.topology else self.service


class Skew(msgspec.Struct, frozen=True):
    """The largest difference in the number of a service's tasks between two domains of a topology."""

    topology: str
    limit: int


class DeclaredAffinities(msgspec.Struct, frozen=True, kw_only=True):
    """The parsed labels of a service."""

    near: tuple[AffinityTerm, ...] = ()
    apart: tuple[AffinityTerm, ...] = ()
    preferred_near: tuple[AffinityTerm, ...] = ()
    preferred_apart: tuple[AffinityTerm, ...] = ()
    skews: tuple[Skew, ...] = ()


def has_affinities(labels: Mapping[str, str]) -> bool:
    """Return whether a service has any of these labels."""
    return any(name in labels for name in PLACEMENT_LABELS)


def affinities_of(labels: Mapping[str, str]) -> DeclaredAffinities:
    """Return the affinities in a service's labels, or none if a label is invalid."""
    try:
        return parsed_affinities(labels)
    except InvalidArgument:
        return DeclaredAffinities()


def parsed_affinities(labels: Mapping[str, str]) -> DeclaredAffinities:
    """Return the affinities in a service's labels.  Raises: InvalidArgument: a label is invalid."""
    found = DeclaredAffinities(
        near=_terms(labels, AFFINITY),
        apart=_terms(labels, ANTI_AFFINITY),
        preferred_near=_terms(labels, AFFINITY_PREFERRED),
        preferred_apart=_terms(labels, ANTI_AFFINITY_PREFERRED),
        skews=_skews(labels),
    )
    for near in found.near:
        for apart in found.apart:
            if contradict(near, apart):
                raise InvalidArgument(
                    f"the labels {AFFINITY}={near.text} and {ANTI_AFFINITY}={apart.text} contradict each other: "
                    "no node could take a task"
                )
    return found


def named_services(labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the services in these labels, sorted."""
    if not has_affinities(labels):
        return ()
    found = affinities_of(labels)
    terms = (*found.near, *found.apart, *found.preferred_near, *found.preferred_apart)
    return tuple(sorted({one.service for one in terms}))


def contradict(near: AffinityTerm, apart: AffinityTerm) -> bool:
    """Return whether no node can be near a service as in one term and apart from it as in the other."""
    return near.key == apart.key and is_opposite(near.topology, apart.topology)


def is_opposite(near: str, apart: str) -> bool:
    """Return whether tasks cannot share a domain of the topology ``near`` and none of ``apart``."""
    return near in ("", apart)


def check_affinities(labels: Mapping[str, str], name: str, *, is_global: bool) -> None:
    """Refuse labels that cannot work with the service's name or mode.  Raises: InvalidArgument."""
    if not has_affinities(labels):
        return
    found, key = parsed_affinities(labels), name.lower()
    if is_global and found.skews:
        raise InvalidArgument(
            f"the label {MAX_SKEW} does not work on global services, which run on every node"
        )
    for label, terms in ((AFFINITY, found.near), (ANTI_AFFINITY, found.apart)):
        if is_global and any(one.key == key for one in terms):
            raise InvalidArgument(f"the label {label} of a global service cannot name the service itself")
    for label, terms in (
        (AFFINITY_PREFERRED, found.preferred_near),
        (ANTI_AFFINITY_PREFERRED, found.preferred_apart),
    ):
        if any(one.key == key for one in terms):
            raise InvalidArgument(
                f"the label {label} cannot name the service itself: use --placement-pref spread=LABEL, or {MAX_SKEW}"
            )


def _terms(labels: Mapping[str, str], name: str) -> tuple[AffinityTerm, ...]:
    if (text := labels.get(name)) is None:
        return ()
    parts = [part.strip() for part in text.split(",", TERMS_MAX)]
    terms = []
    for part in parts:
        service, at, topology = part.partition("@")
        topology = topology.strip()
        if not service or any(map(str.isspace, service)) or (at and not _is_topology(topology)):
            raise InvalidArgument(
                f"invalid label {name}={text}: expected SERVICE[@TOPOLOGY],... with node, node.labels.NAME or "
                "engine.labels.NAME as the topology"
            )
        terms.append(AffinityTerm(service, "" if topology.lower() == _NODE else topology))
    if len(parts) > TERMS_MAX or len({(one.key, one.topology) for one in terms}) < len(terms):
        raise InvalidArgument(
            f"invalid label {name}={text}: expected at most {TERMS_MAX} services, each once per topology"
        )
    return tuple(terms)


def _skews(labels: Mapping[str, str]) -> tuple[Skew, ...]:
    if (text := labels.get(MAX_SKEW)) is None:
        return ()
    skews = []
    for part in text.split(",", TERMS_MAX):
        number, _, topology = (one.strip() for one in part.partition("@"))
        is_number = (
            number.isascii() and number.isdigit() and len(number) <= 4 and 1 <= int(number) <= SKEW_MAX
        )
        if not is_number or not is_label(topology):
            raise InvalidArgument(
                f"invalid label {MAX_SKEW}={text}: expected NUMBER@TOPOLOGY,... with a number from 1 to {SKEW_MAX} and "
                "node.labels.NAME or engine.labels.NAME as the topology"
            )
        skews.append(Skew(topology, int(number)))
    if len({one.topology for one in skews}) < len(skews):
        raise InvalidArgument(f"invalid label {MAX_SKEW}={text}: it names a topology twice")
    return tuple(skews)


def is_label(descriptor: str) -> bool:
    """Return whether ``descriptor`` names a label of nodes: ``node.labels.x`` or ``engine.labels.x``."""
    return any(
        len(descriptor) > len(one) and descriptor.lower().startswith(one)
        for one in (NODE_LABEL, ENGINE_LABEL)
    )


def _is_topology(text: str) -> bool:
    return text.lower() == _NODE or is_label(text)
