"""Conditions of a node, which it reports as engine labels."""

from typing import Final

from skep.model.node import NodeDescription

_PREFIX: Final = "skep.condition."
NEIGHBORS: Final = "neighbor-table"
"""The kernel's neighbor table overflows."""
DISK_SPACE: Final = "disk-space"
"""A disk of the node, or a disk that its containers write to, is nearly full."""
DISK_PRESSURE: Final = "disk-pressure"
"""The node's own disk is full, so it gets no new tasks."""
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


DISK_PRESSURE_LABEL: Final = condition_label(DISK_PRESSURE)


def condition_messages(description: NodeDescription) -> tuple[str, ...]:
    """Return the conditions that a node reports, sorted by name, limited in number and length."""
    labels = description.engine.labels
    named = sorted(filter(is_condition, labels))[:CONDITIONS_MAX]
    return tuple(labels[name][:CHARACTERS_MAX] for name in named)


def disk_pressure(description: NodeDescription) -> str:
    """Return why the node gets no new tasks because its disk is full, or an empty text."""
    return description.engine.labels.get(DISK_PRESSURE_LABEL, "")[:CHARACTERS_MAX]


def network_conditions(description: NodeDescription) -> tuple[str, ...]:
    """Return the network conditions that a node reports."""
    reported = description.engine.labels.get(condition_label(NEIGHBORS), "")
    return (reported[:CHARACTERS_MAX],) if reported else ()
