"""Placement constraints, such as ``node.labels.zone == north``.

Keys and values are compared case-insensitively, but label names keep their case.  A label that a node does not have
counts as empty.

Source: swarmkit, manager/constraint/constraint.go.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec

from skep.errors import InvalidArgument
from skep.model.node import Node

NODE_LABEL = "node.labels."
ENGINE_LABEL = "engine.labels."

_OPERATORS = ("==", "!=")
_KEY = re.compile(r"[a-z_][a-z0-9\-_.]+", re.IGNORECASE | re.ASCII)
_VALUE = re.compile(r"[a-z0-9:\-_\s.*()?+\[\]\\^$|/]+", re.IGNORECASE | re.ASCII)


class Constraint(msgspec.Struct, frozen=True):
    """One parsed expression.  ``negated`` if the operator is ``!=``."""

    key: str
    negated: bool
    value: str


def parse(expression: str) -> Constraint:
    """Parse ``expression``.

    Raises:
        InvalidArgument: with Docker's text.
    """
    for operator in _OPERATORS:
        if operator not in expression:
            continue
        key, _, value = (part.strip() for part in expression.partition(operator))
        if _KEY.fullmatch(key) is None:
            raise InvalidArgument(f"key '{key}' is invalid")
        if _VALUE.fullmatch(value) is None:
            raise InvalidArgument(f"value '{value}' is invalid")
        return Constraint(key, operator == "!=", value)
    raise InvalidArgument(f"constraint expected one operator from {', '.join(_OPERATORS)}")


@lru_cache(maxsize=1024)
def parsed(expressions: tuple[str, ...]) -> tuple[Constraint, ...]:
    """Return the constraints of a service, in their order.  Raises: InvalidArgument."""
    return tuple(parse(expression) for expression in expressions)


def is_satisfied(expressions: Sequence[str], node: Node) -> bool:
    """Return whether ``node`` meets all expressions.  Raises: InvalidArgument: one cannot be parsed."""
    return not expressions or meets(parsed(tuple(expressions)), node)


def meets(constraints: Iterable[Constraint], node: Node) -> bool:
    """Return whether ``node`` meets all ``constraints``.  No node meets a constraint with an unknown key."""
    return all(_is_met(constraint, node) for constraint in constraints)


def label_of(node: Node, descriptor: str) -> str | None:
    """Return the value of ``node.labels.x`` or ``engine.labels.x`` ("" if unset), or None for any other key."""
    for prefix, labels in (
        (NODE_LABEL, node.spec.labels),
        (ENGINE_LABEL, node.description.engine.labels),
    ):
        if len(descriptor) > len(prefix) and descriptor[: len(prefix)].lower() == prefix:
            return labels.get(descriptor[len(prefix) :], "")
    return None


def _is_met(constraint: Constraint, node: Node) -> bool:
    key = constraint.key.lower()
    if key == "node.ip":
        return _is_address_met(constraint, node.status.addr)
    actual = _facts(node).get(key)
    if actual is None:
        actual = label_of(node, constraint.key)
    if actual is None:
        return False
    return (actual.casefold() == constraint.value.casefold()) is not constraint.negated


def _facts(node: Node) -> dict[str, str]:
    description = node.description
    return {
        "node.id": node.id,
        "node.hostname": description.hostname,
        "node.role": node.spec.role.value,
        "node.platform.os": description.platform.os,
        "node.platform.arch": description.platform.architecture,
    }


def _is_address_met(constraint: Constraint, addr: str) -> bool:
    """Compare ``node.ip`` with an address or a subnet.  No node matches any other value."""
    try:
        network = ipaddress.ip_network(constraint.value, strict=False)
    except ValueError:
        return False
    try:
        is_inside = ipaddress.ip_address(addr) in network
    except ValueError:
        is_inside = False
    return is_inside is not constraint.negated
