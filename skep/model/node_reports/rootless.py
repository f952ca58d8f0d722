"""Tasks that a node does not run because it reports that it is rootless, or maps the users of containers.

A rootless node belongs to an ordinary user and lies behind a network of its own.  Other nodes cannot send it packets of
overlay networks.  It has limits only if control groups are delegated to its user, and no ports that need root.

A node that maps the users of its containers (``userns-remap``) belongs to root, but its containers cannot have rights
that need the machine's root.  Like Docker, it refuses them.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

import msgspec

from skep.model.networks.data_planes import driver_of, is_overlay
from skep.model.node import Node
from skep.model.permissions.rights import MachineRights
from skep.model.service import PublishMode, ServiceSpec, TaskSpec
from skep.model.task import NetworkAttachment
from skep.model.values.user_map import MAPPED, USERS_LABEL

ROOTLESS_LABEL: Final = "skep.rootless"
"""Engine label of a rootless node, such as ``ports-from=1024 limits=cpu,memory,pids``."""
LIMITS: Final = ("cpu", "memory", "pids")
"""Control group controllers that a service's limits need."""
_LABEL_CHARACTERS_MAX = 100
"""Characters of a node's label that are read.  Nodes are not trusted."""
_PORTS_FROM = 1024
"""The lowest port of an ordinary user, unless the machine says otherwise.  Source: ip-sysctl.rst of Linux."""


class RootlessNeeds(msgspec.Struct, frozen=True, gc=False):
    """The needs of a task that a rootless node or a node with mapped users may not meet."""

    overlay: str = ""
    """Name of one of its overlay networks."""
    is_on_host_network: bool = False
    limits: tuple[str, ...] = ()
    """The controllers that its limits need, in the order of ``LIMITS``."""
    lowest_port: int = 0
    """Its lowest host-mode port, or 0."""
    has_sctp_port: bool = False
    """Whether it has a host-mode port for SCTP, which RootlessKit cannot open."""
    is_privileged: bool = False
    has_host_processes: bool = False
    """Whether it sees the machine's processes (``skep.pid=host``)."""
    is_process: bool = False
    """Whether it runs a program of the machine (``skep.executor=process``)."""

    def __bool__(self) -> bool:
        return self != _NOTHING


_NOTHING = RootlessNeeds()


def rootless_needs(
    spec: TaskSpec,
    attachments: Iterable[NetworkAttachment],
    service_spec: ServiceSpec | None,
    rights: MachineRights,
) -> RootlessNeeds:
    """Return the needs of a task with ``spec``, its networks, the host-mode ports of its service and its rights."""
    networks = [one.network for one in attachments if one.network is not None]
    endpoint = service_spec.endpoint_spec if service_spec is not None else None
    ports = [one for one in endpoint.ports if one.publish_mode is PublishMode.HOST] if endpoint else []
    limits = spec.resources.limits if spec.resources is not None else None
    amounts = (limits.nano_cpus, limits.memory_bytes, limits.pids) if limits is not None else (0, 0, 0)
    return RootlessNeeds(
        overlay=next((one.spec.name for one in networks if is_overlay(one)), ""),
        is_on_host_network=any(driver_of(one) == "host" for one in networks),
        limits=tuple(name for name, amount in zip(LIMITS, amounts, strict=True) if amount > 0),
        lowest_port=min((one.published_port for one in ports if one.published_port), default=0),
        has_sctp_port=any(one.protocol == "sctp" for one in ports),
        is_privileged=rights.privileged,
        has_host_processes=rights.pid == "host",
        is_process=rights.is_process,
    )


def rootless_label(controllers: Iterable[str], ports_from: int) -> str:
    """Return the label of a rootless node with these ``controllers``, whose user may have ports from ``ports_from``."""
    present = set(controllers)
    limits = ",".join(name for name in LIMITS if name in present)
    return f"ports-from={ports_from} limits={limits}"


def is_rootless(labels: Mapping[str, str]) -> bool:
    """Return whether a node with these engine labels is rootless."""
    return ROOTLESS_LABEL in labels


def is_rootless_node(node: Node) -> bool:
    """Return whether the node is rootless."""
    return is_rootless(node.description.engine.labels)


def lacking(needs: RootlessNeeds, labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the ``needs`` that a node with these engine labels does not meet, in words.  Empty if it runs the task."""
    label = labels.get(ROOTLESS_LABEL)
    if label is None:
        return ()
    ports_from, controllers = _read(label[:_LABEL_CHARACTERS_MAX])
    found = []
    if needs.overlay:
        found.append(f"overlay network {needs.overlay}")
    if needs.is_on_host_network:
        found.append("host network")
    if without := [name for name in needs.limits if name not in controllers]:
        found.append(f"limits of {' and '.join(without)}")
    if 0 < needs.lowest_port < ports_from:
        found.append(f"port {needs.lowest_port}, which is below {ports_from}")
    if needs.has_sctp_port:
        found.append("SCTP port")
    if needs.is_process:
        found.append("plain process")
    return tuple(found)


def refused_by_mapping(needs: RootlessNeeds, labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the ``needs`` that a node with these engine labels refuses because it maps users, in words.

    Sources: ``confinement.machine.check_mapped`` and ``runtime.machine_files``, which refuse them on the node.
    """
    if labels.get(USERS_LABEL) != MAPPED:
        return ()
    found = {
        "privileged": needs.is_privileged,
        "host network": needs.is_on_host_network,
        "processes of the machine": needs.has_host_processes,
        "plain process": needs.is_process,
    }
    return tuple(name for name, is_needed in found.items() if is_needed)


@lru_cache(maxsize=64)
def _read(label: str) -> tuple[int, frozenset[str]]:
    """Return the lowest port and the controllers in a label.  Invalid parts mean the least that a node can have."""
    fields = dict(field.split("=", 1) for field in label.split(" ") if "=" in field)
    number = fields.get("ports-from", "")
    ports_from = int(number) if number.isascii() and number.isdecimal() else _PORTS_FROM
    return ports_from, frozenset(fields.get("limits", "").split(","))
