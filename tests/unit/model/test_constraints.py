"""Placement constraints, as Docker reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.node import EngineDescription, Node, NodeRole
from skep.model.options.constraints import Constraint, is_satisfied, label_of, parse
from skep.model.service import Platform
from tests.support.builders import a_node


def the_node() -> Node:
    node = a_node("abc123", labels={"zone": "North", "empty": ""}, role=NodeRole.MANAGER)
    description = replace(
        node.description,
        hostname="box-1",
        platform=Platform(architecture="x86_64", os="linux"),
        engine=EngineDescription(labels={"disk": "ssd fast"}),
    )
    return replace(node, description=description, status=replace(node.status, addr="10.1.2.3"))


@pytest.mark.parametrize(
    ("expression", "is_met"),
    [
        ("node.id==abc123", True),
        ("node.id == ABC123", True),
        ("node.id!=abc123", False),
        ("node.hostname==box-1", True),
        ("node.hostname==box-2", False),
        ("node.role==manager", True),
        ("node.role!=worker", True),
        ("node.platform.os==linux", True),
        ("node.platform.arch==x86_64", True),
        ("node.ip==10.1.2.3", True),
        ("node.ip==10.1.0.0/16", True),
        ("node.ip!=10.1.0.0/16", False),
        ("node.ip==not-an-address", False),
        ("node.labels.zone==north", True),
        ("node.labels.zone == North", True),
        ("node.labels.Zone==north", False),
        ("node.labels.absent!=x", True),
        ("node.labels.absent==x", False),
        ("engine.labels.disk==ssd fast", True),
        (" engine.labels.disk  ==  ssd fast ", True),
        ("engine.labels.disk!=ssd", True),
        ("node.colour==red", False),
        ("node.colour!=red", False),
    ],
)
def test_a_node_meets_it_or_not(expression: str, is_met: bool) -> None:
    assert is_satisfied((expression,), the_node()) is is_met


def test_all_of_them_have_to_be_met() -> None:
    assert is_satisfied(("node.role==manager", "node.labels.zone==north"), the_node())
    assert not is_satisfied(("node.role==manager", "node.labels.zone==south"), the_node())
    assert is_satisfied((), the_node())


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("node.role", "constraint expected one operator from ==, !="),
        ("node.role=worker", "constraint expected one operator from ==, !="),
        ("==worker", "key '' is invalid"),
        ("1node==worker", "key '1node' is invalid"),
        ("node role==worker", "key 'node role' is invalid"),
        ("node.role==", "value '' is invalid"),
        ("node.role==a>b", "value 'a>b' is invalid"),
    ],
)
def test_what_cannot_be_read_is_refused_in_dockers_words(expression: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse(expression)
    assert str(refused.value) == words


def test_the_first_operator_splits() -> None:
    assert parse("node.labels.a != b") == Constraint("node.labels.a", True, "b")


def test_labels_are_distinguished_from_other_words() -> None:
    assert label_of(the_node(), "node.labels.zone") == "North"
    assert label_of(the_node(), "engine.labels.disk") == "ssd fast"
    assert label_of(the_node(), "node.labels.none") == ""
    assert label_of(the_node(), "node.hostname") is None


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except InvalidArgument:
        pass
