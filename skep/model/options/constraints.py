"""Placement constraints, such as ``node.labels.zone == north`` or ``node.facts.kernel >= 6.1``.

``==`` and ``!=`` are Docker's, with its rules: keys and values are compared case-insensitively, but label names keep
their case, and a label that a node does not have counts as empty.  The other operators are Skep's.  They are read only
if an expression has neither ``==`` nor ``!=``, so each expression that Docker accepts means the same here.

``like`` takes a glob pattern and not a regular expression, because a regular expression of a user could keep the
leader busy for hours.  A pattern is matched without backtracking over ``*``.

Source: swarmkit, manager/constraint/constraint.go; kubernetes, apimachinery labels/selector.go (the words in, notin,
exists, and that a missing label satisfies ``not in``).
"""

import fnmatch
import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from functools import lru_cache
from operator import ge, gt, le, lt
from typing import Any, Final, TypeAlias

import msgspec

from skep.errors import InvalidArgument
from skep.model.needs import CPU_NANO
from skep.model.node import Node
from skep.model.options.affinity import ENGINE_LABEL, NODE_LABEL

FACT = "node.facts."
ENGINE_VERSION = "engine.version"
FACT_LABEL: Final = "skep.fact."
"""Start of the engine labels in which a node reports facts about its machine.  ``node.facts.x`` reads ``skep.fact.x``.
"""


class Test(Enum):
    """Test of a constraint.  The value is the operator without ``not``."""

    EQUAL = "=="
    IN = "in"
    EXISTS = "exists"
    LIKE = "like"
    AT_LEAST = ">="
    AT_MOST = "<="
    MORE = ">"
    LESS = "<"


_EQUALITIES = ("==", "!=")
_COMPARISONS: Final[dict[Test, Callable[[Any, Any], bool]]] = {
    Test.AT_LEAST: ge,
    Test.AT_MOST: le,
    Test.MORE: gt,
    Test.LESS: lt,
}
"""In the order in which they are looked for, because ``>=`` contains ``>``."""
_KEY = re.compile(r"[a-z_][a-z0-9\-_.]+", re.IGNORECASE | re.ASCII)
_VALUE = re.compile(r"[a-z0-9:\-_\s.*()?+\[\]\\^$|/]+", re.IGNORECASE | re.ASCII)
_WORDS = re.compile(r"(\S+)\s+(not\s+)?(in|exists|like)\b(.*)", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(
    r"v?([0-9]{1,15}(?:\.[0-9]{1,15}){0,9})(?:[-+~_ ].*)?", re.IGNORECASE | re.ASCII | re.DOTALL
)
"""A number or version.  What follows ``-``, ``+``, ``~``, ``_`` or a blank is ignored, as in ``6.1.0-18-amd64``."""
_PREFIXES: Final = (NODE_LABEL, ENGINE_LABEL, FACT)
_SIMILARITY_MIN: Final = 0.75
"""Least similarity of a misspelled key.  With 0.7, ``node.foo`` would mean ``node.role``."""
VALUES_MAX: Final = 100
"""Most values of ``in``.  Every node is compared with each, and longer lists are better written as a label."""
PATTERN_CHARACTERS_MAX: Final = 255
"""Longest pattern of ``like``, as long as the longest host name."""

_Number: TypeAlias = tuple[int, ...]
_Reader: TypeAlias = Callable[[Node], str | None]
"""Returns the value of a key, or None if the node does not have it."""


class Constraint(msgspec.Struct, frozen=True):
    """One parsed expression.  ``negated`` if the operator is ``!=`` or begins with ``not``."""

    key: str
    negated: bool
    value: str
    test: Test = Test.EQUAL

    @property
    def text(self) -> str:
        """The expression with single blanks."""
        if self.test is Test.EQUAL:
            operator = _EQUALITIES[self.negated]
        else:
            operator = f"not {self.test.value}" if self.negated else self.test.value
        return f"{self.key} {operator} {self.value}".rstrip()


def parse(expression: str) -> Constraint:
    """Parse ``expression``.

    Raises:
        InvalidArgument: with Docker's text, if the expression has none of the operators that Docker lacks.
    """
    for operator in _EQUALITIES:
        if operator in expression:
            key, value = _split(expression, operator)
            if _VALUE.fullmatch(value) is None:
                raise InvalidArgument(f"value '{value}' is invalid")
            return Constraint(key, operator == "!=", value)
    for test in _COMPARISONS:
        if test.value in expression:
            key, value = _split(expression, test.value)
            if _number(value) is None:
                raise InvalidArgument(
                    f"value '{value}' is invalid: {test.value} expects a number or a version"
                )
            return Constraint(key, False, value, test)
    if (words := _WORDS.fullmatch(expression.strip())) is not None:
        key, negation, word, rest = words.groups()
        _check_key(key)
        operator = " ".join(f"{negation or ''}{word}".split())
        if operator != operator.lower():
            raise InvalidArgument(f"operator '{operator}' is invalid: write {operator.lower()}")
        test = Test(word)
        return Constraint(key, bool(negation), _operand(test, rest.strip()), test)
    raise InvalidArgument(f"constraint expected one operator from {', '.join(_EQUALITIES)}")


def is_dockers(constraint: Constraint) -> bool:
    """Return whether Docker and earlier versions of Skep understand the constraint."""
    key = constraint.key.lower()
    return constraint.test is Test.EQUAL and not key.startswith(FACT) and key != ENGINE_VERSION


@lru_cache(maxsize=1024)
def parsed(expressions: tuple[str, ...]) -> tuple[Constraint, ...]:
    """Return the constraints of a service, in their order.  Raises: InvalidArgument."""
    return tuple(parse(expression) for expression in expressions)


def is_satisfied(expressions: Sequence[str], node: Node) -> bool:
    """Return whether ``node`` meets all expressions.  Raises: InvalidArgument: one cannot be parsed."""
    return not expressions or meets(parsed(tuple(expressions)), node)


def meets(constraints: Iterable[Constraint], node: Node) -> bool:
    """Return whether ``node`` meets all ``constraints``.  No node meets a constraint with an unknown key."""
    return all(_check_of(constraint)(node) for constraint in constraints)


def unknown_key(constraint: Constraint, nodes: Collection[Node]) -> str:
    """Return that no node of any version here can have the constraint's key, with the key that is probably meant.

    Empty for a known key.  A fact is known if one of ``nodes`` reports it, or if ``nodes`` is empty.
    """
    key = constraint.key
    read = _reader(key)
    if read is None:
        from difflib import get_close_matches  # rarely needed, and 0.15 MB in every manager

        first, _, last = key.rpartition(".")
        named = [prefix + last for prefix in _PREFIXES] if "." in first else []
        keys = {one.lower(): one for one in (*_READERS, *named)}
        near = get_close_matches(key.lower(), sorted(keys), n=1, cutoff=_SIMILARITY_MIN)
        return f"no node has the key {key}" + (f", did you mean {keys[near[0]]}?" if near else "")
    is_fact = key.lower().startswith(FACT) and key.lower() not in _READERS
    if is_fact and nodes and all(read(node) is None for node in nodes):
        return f"no node reports {key}"
    return ""


def label_of(node: Node, descriptor: str) -> str | None:
    """Return the value of ``node.labels.x`` or ``engine.labels.x`` ("" if unset), or None for any other key."""
    read = label_reader(descriptor)
    return (read(node) or "") if read is not None else None


# -- parsing -------------------------------------------------------------------------------------------------------


def _split(expression: str, operator: str) -> tuple[str, str]:
    key, _, value = (part.strip() for part in expression.partition(operator))
    _check_key(key)
    return key, value


def _check_key(key: str) -> None:
    if _KEY.fullmatch(key) is None:
        raise InvalidArgument(f"key '{key}' is invalid")


def _operand(test: Test, text: str) -> str:
    """Return the checked value of ``in``, ``exists`` or ``like``.  Raises: InvalidArgument."""
    if test is Test.EXISTS:
        if text:
            raise InvalidArgument(f"value '{text}' is invalid: exists has no value")
        return ""
    if test is Test.IN:
        if not (text.startswith("(") and text.endswith(")")):
            raise InvalidArgument(f"value '{text}' is invalid: in expects a list such as (a, b)")
        values = _listed(text)
        if len(values) > VALUES_MAX:
            raise InvalidArgument(f"in has {len(values)} values, of at most {VALUES_MAX}")
        for value in values:
            if _VALUE.fullmatch(value) is None:
                raise InvalidArgument(f"value '{value}' is invalid: in expects a list such as (a, b)")
        return f"({', '.join(values)})"
    if _VALUE.fullmatch(text) is None or len(text) > PATTERN_CHARACTERS_MAX:
        raise InvalidArgument(
            f"value '{text[:PATTERN_CHARACTERS_MAX]}' is invalid: like expects a pattern such as web-*, of at most "
            f"{PATTERN_CHARACTERS_MAX} characters"
        )
    return text


def _listed(value: str) -> list[str]:
    return [one.strip() for one in value[1:-1].split(",")]


# -- nodes -----------------------------------------------------------------------------------------------------------


_READERS: Final[dict[str, _Reader]] = {
    "node.id": lambda node: node.id,
    "node.hostname": lambda node: node.description.hostname or None,
    "node.role": lambda node: node.spec.role.value,
    "node.ip": lambda node: node.status.addr or None,
    "node.platform.os": lambda node: node.description.platform.os or None,
    "node.platform.arch": lambda node: node.description.platform.architecture or None,
    ENGINE_VERSION: lambda node: node.description.engine.engine_version or None,
    "node.facts.arch": lambda node: node.description.platform.architecture or None,
    "node.facts.cpus": lambda node: str(node.description.resources.nano_cpus // CPU_NANO),
    "node.facts.memory": lambda node: str(node.description.resources.memory_bytes // (1 << 20)),
}


@lru_cache(maxsize=1024)
def _check_of(constraint: Constraint) -> Callable[[Node], bool]:
    """Return a function that tells whether a node meets ``constraint``."""
    negated = constraint.negated
    if constraint.key.lower() == "node.ip" and constraint.test in (Test.EQUAL, Test.IN):
        return _address_check(constraint)
    read = _reader(constraint.key)
    if read is None:
        return lambda node: False
    value = constraint.value.casefold()
    match constraint.test:
        case Test.EQUAL:
            return lambda node: ((read(node) or "").casefold() == value) is not negated
        case Test.EXISTS:
            return lambda node: (read(node) is not None) is not negated
        case Test.IN:
            values = frozenset(_listed(value))
            return lambda node: ((read(node) or "").casefold() in values) is not negated
        case Test.LIKE:
            # The translation puts each part between two stars into an atomic group, so it does not backtrack.
            matches = re.compile(fnmatch.translate(value)).match
            return lambda node: (matches((read(node) or "").casefold()) is not None) is not negated
        case _:
            compare, limit = _COMPARISONS[constraint.test], _number(value)
            return lambda node: (found := _number(read(node) or "")) is not None and compare(found, limit)


def _reader(key: str) -> _Reader | None:
    """Return the function that reads ``key``, or None for an unknown key."""
    lower = key.lower()
    if (read := _READERS.get(lower) or label_reader(key)) is not None:
        return read
    if lower.startswith(FACT):
        label = FACT_LABEL + lower.removeprefix(FACT)
        return lambda node: node.description.engine.labels.get(label)
    return None


@lru_cache(maxsize=1024)
def label_reader(key: str) -> _Reader | None:
    """Return what reads ``node.labels.x`` or ``engine.labels.x`` of a node, or None for any other key."""
    lower = key.lower()
    if lower.startswith(NODE_LABEL) and (node_label := key[len(NODE_LABEL) :]):
        return lambda node: node.spec.labels.get(node_label)
    if lower.startswith(ENGINE_LABEL) and (engine_label := key[len(ENGINE_LABEL) :]):
        return lambda node: node.description.engine.labels.get(engine_label)
    return None


def _number(text: str) -> _Number | None:
    """Return the parts of a number or version without zeros at the end, or None if the text begins with neither."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    parts = [int(part) for part in found[1].split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def _address_check(constraint: Constraint) -> Callable[[Node], bool]:
    """Compare ``node.ip`` with addresses or subnets.  No node matches any other value."""
    listed = _listed(constraint.value) if constraint.test is Test.IN else [constraint.value]
    try:
        networks = [ipaddress.ip_network(one, strict=False) for one in listed]
    except ValueError:
        return lambda node: False

    def is_met(node: Node) -> bool:
        try:
            address = ipaddress.ip_address(node.status.addr)
        except ValueError:
            return constraint.negated
        return any(address in network for network in networks) is not constraint.negated

    return is_met
