"""What all nodes here have in force of a network."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.manager.discovery.acknowledgements import Acknowledgements
from skep.model.values.ids import NetworkId, NodeId

NET, OTHER = NetworkId("net"), NetworkId("other")
N1, N2 = NodeId("n1"), NodeId("n2")


def of_two() -> Acknowledgements:
    known = Acknowledgements()
    known.set_networks(N1, "s1", (NET,))
    known.set_networks(N2, "s1", (NET, OTHER))
    return known


def test_the_slowest_node_counts() -> None:
    known = of_two()
    known.applied(N1, NET, 7)
    assert (known.smallest(NET), known.has_applied(NET, 5)) == (0, False)
    known.applied(N2, NET, 5)
    assert (known.smallest(NET), known.has_applied(NET, 5), known.has_applied(NET, 6)) == (5, True, False)


def test_without_participants_there_is_no_wait() -> None:
    known = Acknowledgements()
    assert (known.smallest(NET), known.has_applied(NET, 5)) == (None, True)


def test_what_was_acknowledged_is_not_taken_back_and_does_not_come_from_elsewhere() -> None:
    known = of_two()
    known.applied(N1, NET, 7)
    known.applied(N1, NET, 6)
    known.applied(N1, OTHER, 9)
    known.applied(NodeId("stranger"), NET, 1)
    known.set_networks(N2, "s1", (OTHER,))
    assert (known.smallest(NET), known.smallest(OTHER)) == (7, 0)


@pytest.mark.parametrize("how", ["another session", "another stream", "gone and back"])
def test_a_returning_node_has_no_acknowledgement(how: str) -> None:
    known = of_two()
    known.applied(N1, NET, 7)
    known.applied(N2, NET, 7)
    match how:
        case "another session":
            known.set_networks(N1, "s2", (NET,))
        case "another stream":
            known.reset_node(N1)
        case _:
            known.remove_node(N1)
            known.set_networks(N1, "s1", (NET,))
    assert known.smallest(NET) == 0
    known.applied(N1, NET, 5)
    assert known.smallest(NET) == 5


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["n1", "n2", "n3"]),
            st.sampled_from(["apply", "gone", "take part", "another session", "another stream"]),
            st.integers(0, 5),
        )
    )
)
def test_the_smallest_is_the_smallest_whatever_happens(steps: list[tuple[str, str, int]]) -> None:
    known = Acknowledgements()
    model: dict[str, int] = {}
    session = dict.fromkeys(("n1", "n2", "n3"), "s0")
    for node, what, revision in steps:
        match what:
            case "apply":
                known.applied(NodeId(node), NET, revision)
                if node in model:
                    model[node] = max(model[node], revision)
            case "gone":
                known.remove_node(NodeId(node))
                model.pop(node, None)
            case "take part":
                known.set_networks(NodeId(node), session[node], (NET, OTHER) if revision % 2 else (NET,))
                model.setdefault(node, 0)
            case "another session":
                session[node] += "+"
                known.set_networks(NodeId(node), session[node], (NET,))
                model[node] = 0
            case "another stream":
                known.reset_node(NodeId(node))
                model |= {node: 0} if node in model else {}
        assert known.smallest(NET) == min(model.values(), default=None)


async def test_a_wait_ends_with_the_last_acknowledgement_or_the_end_of_its_node() -> None:
    known = of_two()
    async with asyncio.TaskGroup() as group:
        waits = [group.create_task(known.wait_applied(NET, revision)) for revision in (5, 6)]
        await asyncio.sleep(0)
        known.applied(N1, NET, 9)
        known.applied(N2, NET, 5)
        await waits[0]
        assert not waits[1].done()
        known.remove_node(N2)
    assert known.has_applied(NET, 9)


async def test_a_wait_goes_on_for_a_node_that_is_back_at_once() -> None:
    known = of_two()
    async with asyncio.TaskGroup() as group:
        wait = group.create_task(known.wait_applied(OTHER, 5))
        await asyncio.sleep(0)
        known.remove_node(N2)
        known.set_networks(N2, "s1", (NET, OTHER))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not wait.done()
        known.applied(N2, OTHER, 5)
