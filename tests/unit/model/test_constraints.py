"""Placement constraints: Docker's, and those that Docker does not have."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.needs import CPU_NANO
from skep.model.node import EngineDescription, Node, NodeRole
from skep.model.options.constraints import Constraint, is_dockers, is_satisfied, label_of, parse, unknown_key
from skep.model.service import Platform, Resources
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


@pytest.mark.parametrize(
    ("expression", "is_met"),
    [
        ("node.labels.zone in (south, north)", True),
        ("node.labels.zone in (south,west)", False),
        ("node.labels.zone not in (south)", True),
        ("node.labels.zone not in (north)", False),
        ("node.labels.absent in (north)", False),
        ("node.labels.absent not in (north)", True),
        ("node.ip in (192.168.0.0/16, 10.1.0.0/16)", True),
        ("node.ip not in (192.168.0.0/16, 10.1.0.0/16)", False),
        ("node.labels.zone exists", True),
        ("node.labels.empty exists", True),
        ("node.labels.absent exists", False),
        (" node.labels.absent  not  exists ", True),
        ("node.labels.zone like nor*", True),
        ("node.labels.zone like ?orth", True),
        ("node.labels.zone like nor", False),
        ("node.labels.zone not like n*h", False),
        ("node.hostname like box-[0-9]", True),
        ("node.labels.cores >= 8", True),
        ("node.labels.cores >8", False),
        ("node.labels.cores<=8", True),
        ("node.labels.cores < 16", True),
        ("node.labels.zone >= 8", False),
        ("node.labels.absent <= 8", False),
        ("engine.version >= 20.10", True),
        ("engine.version > 20.9.30", True),
        ("engine.version < 20.10.24", False),
        ("node.facts.kernel >= 6.1", True),
        ("node.facts.kernel >= 6.1.1", False),
        ("node.facts.distribution == Debian", True),
        ("node.facts.distribution exists", True),
        ("node.facts.cgroup exists", False),
        ("node.facts.cpus >= 4", True),
        ("node.facts.memory >= 2048", True),
        ("node.facts.memory > 2048", False),
        ("node.facts.arch in (x86_64, amd64)", True),
        ("node.colour exists", False),
        ("node.colour not exists", False),
        ("node.colour not in (red)", False),
    ],
)
def test_a_node_meets_what_docker_does_not_have(expression: str, is_met: bool) -> None:
    node = the_node()
    engine = EngineDescription(
        engine_version="20.10.24",
        labels={"skep.fact.kernel": "6.1.0-18-amd64", "skep.fact.distribution": "debian"},
    )
    resources = Resources(nano_cpus=4 * CPU_NANO, memory_bytes=2 << 30)
    node = replace(
        node,
        spec=replace(node.spec, labels={**node.spec.labels, "cores": "8"}),
        description=replace(node.description, engine=engine, resources=resources),
    )
    assert is_satisfied((expression,), node) is is_met
    assert not is_dockers(parse(expression)) or "==" in expression


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("node.labels.x in a, b", "value 'a, b' is invalid: in expects a list such as (a, b)"),
        ("node.labels.x in ()", "value '' is invalid: in expects a list such as (a, b)"),
        ("node.labels.x in (a,,b)", "value '' is invalid: in expects a list such as (a, b)"),
        ("node.labels.x NOT  IN (a)", "operator 'NOT IN' is invalid: write not in"),
        ("node.labels.x Like a*", "operator 'Like' is invalid: write like"),
        ("node.labels.x in (a, <)", "key 'node.labels.x in (a,' is invalid"),
        ("node.labels.x exists yes", "value 'yes' is invalid: exists has no value"),
        ("node.labels.x >= many", "value 'many' is invalid: >= expects a number or a version"),
        ("node labels in (a)", "constraint expected one operator from ==, !="),
        ("1x exists", "key '1x' is invalid"),
        ("node.labels.x like", "value '' is invalid: like expects a pattern"),
        (f"node.labels.x like {'*a' * 200}", "of at most 255 characters"),
        (f"node.labels.x in ({','.join(map(str, range(101)))})", "in has 101 values, of at most 100"),
    ],
)
def test_what_docker_does_not_have_is_refused_by_name(expression: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(words)):
        parse(expression)


def test_a_pattern_is_matched_in_linear_time() -> None:
    """With backtracking, this takes longer than the age of the universe."""
    node = a_node("n1", labels={"x": "a" * 10_000})
    assert not is_satisfied((f"node.labels.x like {'*a' * 120}*b",), node)


@given(
    st.sampled_from(
        ("==", "!=", "in", "not in", "exists", "not exists", "like", "not like", ">=", "<=", ">", "<")
    ),
    st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,2})?", fullmatch=True),
)
def test_the_text_of_a_constraint_is_the_constraint(operator: str, value: str) -> None:
    operand = "" if operator.endswith("exists") else f"({value}, b)" if operator.endswith("in") else value
    read = parse(f" node.labels.x   {operator} {operand}")
    assert read.text == f"node.labels.x {operator} {operand}".rstrip()
    assert parse(read.text) == read


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


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("node.label.zone exists", "no node has the key node.label.zone, did you mean node.labels.zone?"),
        ("engine.label.disk==ssd", "no node has the key engine.label.disk, did you mean engine.labels.disk?"),
        ("node.fact.Kernel >= 5", "no node has the key node.fact.Kernel, did you mean node.facts.Kernel?"),
        ("hostname == box-1", "no node has the key hostname, did you mean node.hostname?"),
        ("node.colour == red", "no node has the key node.colour"),
        ("node.facts.cgroups == 2", "no node reports node.facts.cgroups"),
        ("node.facts.cpus >= 64", ""),
        ("node.labels.absent exists", ""),
        ("node.ip == 10.0.0.1", ""),
    ],
)
def test_a_key_that_no_node_can_have_is_named(expression: str, words: str) -> None:
    assert unknown_key(parse(expression), [the_node()]) == words


def test_a_fact_is_known_without_nodes_to_compare() -> None:
    assert unknown_key(parse("node.facts.cgroups == 2"), []) == ""
