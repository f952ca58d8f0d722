"""Refusals of the scheduler: the text in a task's status names the reasons that made it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.model.node_reports.node_refusals import (
    NO_NODE,
    NodeRefusal,
    is_no_node,
    no_node_text,
    node_refusals_in,
    refusals_text,
)

REASONS = st.dictionaries(st.sampled_from(NodeRefusal), st.integers(1, 20_000))


@given(REASONS)
def test_the_reasons_of_a_text_are_those_that_made_it(counts: dict[NodeRefusal, int]) -> None:
    bare = refusals_text(counts.items())
    text = no_node_text(bare)
    assert is_no_node(text)
    assert node_refusals_in(bare) == set(counts)
    assert node_refusals_in(text) == set(counts)
    assert node_refusals_in(f"{text}; preempts 2 tasks of db") == set(counts)


def test_a_text_is_dockers() -> None:
    refused = [(NodeRefusal.RESOURCES, 2), (NodeRefusal.CONSTRAINTS, 1), (NodeRefusal.MAX_REPLICAS, 1)]
    assert no_node_text(refusals_text(refused)) == (
        "no suitable node (insufficient resources on 2 nodes; scheduling constraints not satisfied on 1 node; "
        "max replicas per node limit exceed)"
    )
    assert no_node_text("") == NO_NODE


@pytest.mark.parametrize(
    "error",
    [
        "",
        NO_NODE,
        "could not find an available IP",
        'image "disk full on 1 node" was not found',
        "scheduling failed: insufficient resources on 1 nodesomething",
    ],
)
def test_an_error_that_only_quotes_such_words_names_no_reason(error: str) -> None:
    assert not node_refusals_in(error)
