"""Conditions of a node as engine labels, by which its managers hear of them."""

from typing import Final

from skep.model.node import NodeDescription

_PREFIX: Final = "skep.condition."
NEIGHBOURS: Final = "neighbours"
"""The kernel's table of neighbours overflows."""
CHARACTERS_MAX: Final = 300
CONDITIONS_MAX: Final = 16


def condition_label(name: str) -> str:
    """``skep.condition.disk``."""
    return _PREFIX + name


def condition_messages(description: NodeDescription) -> tuple[str, ...]:
    """What a node says is wrong with it, by name; bounded, whatever the node sent."""
    labels = description.engine.labels
    named = sorted(name for name in labels if name.startswith(_PREFIX))[:CONDITIONS_MAX]
    return tuple(labels[name][:CHARACTERS_MAX] for name in named)


def network_conditions(description: NodeDescription) -> tuple[str, ...]:
    """What a node says is wrong with its network."""
    said = description.engine.labels.get(condition_label(NEIGHBOURS), "")
    return (said[:CHARACTERS_MAX],) if said else ()
