"""Which nodes are avoided when pairs of nodes do not reach each other."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.probes.avoidance import avoidances, avoided
from skep.model.networks.data_planes import NODE_LABEL, PATHS_LABEL
from skep.model.node import Availability, CutOff, EngineDescription, FailingPath, Node, NodeState, NodeStatus
from skep.model.values.ids import NodeId
from skep.model.values.times import timestamp
from tests.support.builders import a_docker_node, a_node

NODES = st.lists(st.integers(0, 12).map(lambda number: f"n{number:02}"), unique=True, min_size=1)


@given(NODES, st.data())
def test_the_remaining_nodes_reach_each_other_and_there_is_at_least_one(
    nodes: list[str], data: st.DataObject
) -> None:
    pairs = data.draw(st.sets(st.tuples(st.sampled_from(nodes), st.sampled_from(nodes))))
    taken = avoided(pairs, nodes)
    left = set(nodes) - set(taken)
    assert left
    assert not any(one in left and other in left for one, other in pairs if one != other)
    assert len(taken) == len(set(taken))
    # None was removed needlessly: added back last, it would have a failing path to a remaining node.
    for position, id in enumerate(taken):
        others = set(nodes) - set(taken[:position])
        assert any({id} < {one, other} <= others for one, other in pairs)


def test_the_one_with_the_most_failing_pairs_is_to_blame() -> None:
    pairs = [("n1", "n3"), ("n2", "n3"), ("n3", "n4")]
    assert avoided(pairs, ["n3", "n1", "n2", "n4"]) == ["n3"]


def test_of_two_that_are_alike_the_later_one_goes() -> None:
    assert avoided([("n1", "n2")], ["n1", "n2"]) == ["n2"]
    assert avoided([("n1", "n2")], ["n2", "n1"]) == ["n1"]
    assert avoided([("n1", "n2"), ("n2", "n1")], ["n2", "n1"]) == ["n1"]


def test_pairs_with_strangers_do_not_count() -> None:
    assert avoided([("n1", "gone")], ["n1", "n2"]) == []


def a_probing_node(
    id: str, *unreached: str, joined: int = 0, check: str = "overlay", port: str = "4789/udp"
) -> Node:
    node = a_node(id)
    engine = EngineDescription(engine_version="1", labels={NODE_LABEL: "true", PATHS_LABEL: "1"})
    return replace(
        node,
        created_at=timestamp(joined * 1_000_000_000),
        description=replace(node.description, engine=engine),
        failing_paths=tuple(
            FailingPath(peer=NodeId(peer), hostname=peer, check=check, port=port) for peer in unreached
        ),
    )


def test_a_pair_fails_when_both_say_so() -> None:
    one, other = a_probing_node("n1", "n2", joined=1), a_probing_node("n2", "n1", joined=2)
    assert avoidances([one, other]) == {"n2": (CutOff(check="overlay", port="4789/udp", peers=("n1",)),)}
    assert avoidances([one, a_probing_node("n2")]) == {}


def test_a_node_that_takes_tasks_is_kept_rather_than_one_that_does_not() -> None:
    one, other = a_probing_node("n1", "n2", joined=1), a_probing_node("n2", "n1", joined=2)
    drained = replace(one, spec=replace(one.spec, availability=Availability.DRAIN))
    assert list(avoidances([drained, other])) == ["n1"]


def test_with_a_node_that_is_down_nothing_is_wrong_on_the_way() -> None:
    one, other = a_probing_node("n1", "n2"), a_probing_node("n2", "n1")
    assert avoidances([one, replace(other, status=NodeStatus(state=NodeState.DOWN))]) == {}
    assert avoidances([one, replace(a_docker_node("n2"), failing_paths=other.failing_paths)]) == {}


def test_a_control_port_that_is_closed_keeps_no_task_away() -> None:
    one = a_probing_node("n1", "n2", check="control", port="2377/tcp")
    other = a_probing_node("n2", "n1", check="control", port="2377/tcp")
    assert avoidances([one, other]) == {}


def test_ways_are_judged_one_by_one() -> None:
    def both(id: str, peer: str, joined: int) -> Node:
        node = a_probing_node(id, peer, joined=joined)
        secret = a_probing_node(id, peer, check="encrypted", port="4799/udp").failing_paths
        return replace(node, failing_paths=(*node.failing_paths, *secret))

    judged = avoidances([both("n1", "n2", 1), both("n2", "n1", 2)])
    assert [one.check for one in judged[NodeId("n2")]] == ["encrypted", "overlay"]


def test_only_some_of_those_that_are_not_reached_are_named() -> None:
    others = [f"n{number}" for number in range(2, 8)]
    nodes = [a_probing_node("n1", *others), *(a_probing_node(id, "n1") for id in others)]
    (judged,) = avoidances(nodes)[NodeId("n1")]
    assert judged.summary == "4789/udp fails between this node and n2, n3, n4 and 3 others"
    assert list(avoidances(nodes)) == ["n1"]
