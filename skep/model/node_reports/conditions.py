"""Conditions of a node, which it reports as engine labels."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from skep.model.node import NodeDescription

_PREFIX: Final = "skep.condition."


class ConditionName(StrEnum):
    """Every condition.  ``docs/guide/troubleshooting.md`` has an entry for each."""

    APPARMOR = "apparmor"
    """The AppArmor profile is missing, so containers do not start."""
    DESCRIPTION_SIZE = "description-size"
    """The node's description was cut because it is too large."""
    DISK = "disk"
    """The node cannot write to its disk."""
    DISK_PRESSURE = "disk-pressure"
    """The node's own disk is full, so it gets no new tasks."""
    DISK_SPACE = "disk-space"
    """A disk of the node, or a disk that its containers write to, is nearly full."""
    ENCRYPTED_NETWORKS = "encrypted-networks"
    """WireGuard does not work, so encrypted networks carry no traffic."""
    FAILOVER_ADDRESS = "failover-address"
    """The hook of a failover address fails."""
    IMAGES = "images"
    """Images are damaged or were removed outside of Skep."""
    MANAGER = "manager"
    """The manager process lacks a resource of the machine and does not run."""
    MANAGER_UNREACHABLE = "manager-unreachable"
    """The node reaches no manager."""
    NAT_TUNNELS = "nat-tunnels"
    """Tunnels through NAT do not work, or do not lead to every node."""
    NEIGHBOR_TABLE = "neighbor-table"
    """The kernel's neighbor table overflows."""
    NETWORKS = "networks"
    """The networks of some containers are not maintained."""
    REBOOT_REQUIRED = "reboot-required"
    """The machine needs a reboot, for example because a new kernel is installed."""
    RESTORE = "restore"
    """Some containers were not adopted when the node started."""
    STORE_FULL = "store-full"
    """A manager's disk lacks space for its store."""
    SWARM = "swarm"
    """The node cannot read which cluster it belongs to."""
    USERS = "users"
    """Containers run with another ``userns-remap`` than the node has."""


NO_MANAGER_ANSWERS: Final = "no manager answers"
"""Beginning of the condition ``manager-unreachable`` of a worker that runs on without managers."""
NO_QUORUM: Final = "this manager has lost contact with the others"
"""How a manager without a quorum refuses nodes, which then name it in the condition ``manager-unreachable``."""
CHARACTERS_MAX: Final = 300
"""Longest text of one condition, in characters."""
CONDITIONS_MAX: Final = 16
"""Largest number of conditions of one node."""


def condition_label(name: str) -> str:
    """Return the label of a condition, ``skep.condition.disk``."""
    return _PREFIX + name


def is_condition(label: str) -> bool:
    """Return whether an engine label carries a condition."""
    return label.startswith(_PREFIX)


DISK_PRESSURE_LABEL: Final = condition_label(ConditionName.DISK_PRESSURE)
BOOT_LABEL: Final = "skep.boot"
"""Engine label with the boot id of the node's kernel, which tells a reboot from a restart of the daemon."""


def condition_messages(description: NodeDescription) -> tuple[str, ...]:
    """Return the conditions that a node reports, sorted by name, limited in number and length."""
    labels = description.engine.labels
    named = sorted([name for name in labels if name.startswith(_PREFIX)])[:CONDITIONS_MAX]
    return tuple(labels[name][:CHARACTERS_MAX] for name in named)


def disk_pressure(description: NodeDescription) -> str:
    """Return why the node gets no new tasks because its disk is full, or an empty text."""
    return description.engine.labels.get(DISK_PRESSURE_LABEL, "")[:CHARACTERS_MAX]


def reboot_reason(labels: Mapping[str, str]) -> str:
    """Return why a node with these engine labels needs a reboot, or an empty text."""
    return labels.get(condition_label(ConditionName.REBOOT_REQUIRED), "")[:CHARACTERS_MAX]


def network_conditions(description: NodeDescription) -> tuple[str, ...]:
    """Return the network conditions that a node reports."""
    labels = description.engine.labels
    names = (ConditionName.NEIGHBOR_TABLE, ConditionName.NAT_TUNNELS)
    reported = (labels.get(condition_label(name), "") for name in names)
    return tuple(one[:CHARACTERS_MAX] for one in reported if one)
