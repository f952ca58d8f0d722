"""From desired roles to members of the consensus and certificates."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from skep.manager.membership.roles import (
    LEARNING_S,
    Demote,
    Keep,
    Learners,
    Promote,
    TransferLeadership,
    Withdraw,
    keeps_quorum,
    next_steps,
)
from skep.model.node import ManagerStatus, Node, NodeCertificate, NodeRole, NodeSpec, Reachability
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember

WORKER, MANAGER = NodeRole.WORKER, NodeRole.MANAGER
OWN = NodeId("a")


def a_node(id: str, requested: NodeRole, certified: NodeRole, *, is_shown: bool = False) -> Node:
    return Node(
        id=NodeId(id),
        spec=NodeSpec(role=requested),
        certificate=NodeCertificate(role=certified),
        manager_status=ManagerStatus(reachability=Reachability.REACHABLE) if is_shown else None,
    )


def members(names: str, learners: str = "") -> list[RaftMember]:
    return [
        RaftMember(name=name, url=f"https://{name}:2378", id=ord(name), is_learner=name in learners)
        for name in names
    ]


def managers(names: str) -> list[Node]:
    return [a_node(name, MANAGER, MANAGER, is_shown=True) for name in names]


def test_nothing_is_done_while_roles_and_members_agree() -> None:
    nodes = [*managers("abc"), a_node("w", WORKER, WORKER)]
    assert next_steps(nodes, members("abc"), set("abc"), OWN) == []


def test_a_promotion_begins_with_the_certificate() -> None:
    nodes = [*managers("a"), a_node("w", MANAGER, WORKER)]
    assert next_steps(nodes, members("a"), {"a"}, OWN) == [Promote(NodeId("w"))]


def test_a_promoted_node_that_has_not_come_in_yet_is_left_alone() -> None:
    nodes = [*managers("a"), a_node("w", MANAGER, MANAGER)]
    assert next_steps(nodes, members("a"), {"a"}, OWN) == []


def test_a_demotion_begins_with_the_consensus() -> None:
    nodes = [*managers("ab"), a_node("c", WORKER, MANAGER, is_shown=True)]
    abc = members("abc")
    assert next_steps(nodes, abc, set("abc"), OWN) == [Withdraw(abc[2])]
    assert next_steps(nodes, members("ab"), set("ab"), OWN) == [Demote(NodeId("c"))]


def test_a_demotion_that_would_cost_the_quorum_waits() -> None:
    nodes = [*managers("ab"), a_node("c", WORKER, MANAGER, is_shown=True)]
    abc = members("abc")
    assert next_steps(nodes, abc, {"a", "c"}, OWN) == [Keep(abc[2])]


def test_the_leader_hands_over_before_it_goes() -> None:
    nodes = [a_node("a", WORKER, MANAGER, is_shown=True), *managers("bc")]
    abc = members("abc")
    assert next_steps(nodes, abc, {"a", "c"}, OWN) == [Keep(abc[0])]
    assert next_steps(nodes, abc, set("abc"), OWN) == [TransferLeadership(abc[1])]


def test_of_several_that_go_the_leader_goes_last_and_never_to_one_that_goes_too() -> None:
    nodes = [a_node("a", WORKER, MANAGER), a_node("b", WORKER, MANAGER), *managers("cde")]
    all_of_them = members("abcde")
    assert next_steps(nodes, all_of_them, set("abcde"), OWN) == [Withdraw(all_of_them[1])]
    assert next_steps(nodes, all_of_them, set("abcde"), NodeId("c")) == [Withdraw(all_of_them[0])]
    rest = members("acde")
    assert next_steps(nodes, rest, set("acde"), OWN)[-1] == TransferLeadership(rest[1])


def test_a_member_whose_node_was_removed_goes_too() -> None:
    abc = members("abc")
    assert next_steps(managers("ab"), abc, {"a", "b"}, OWN) == [Withdraw(abc[2])]


@given(
    roles=st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from(NodeRole), min_size=1),
    silent=st.sets(st.sampled_from("bcdefg")),
)
def test_no_sequence_of_role_changes_costs_the_quorum(
    roles: Mapping[str, NodeRole], silent: set[str]
) -> None:
    """Step after step is taken as it comes; before and after each one those that answer decide."""
    voters = {"a", *roles}
    own = NodeId("a")
    reachable = voters - silent
    nodes = [a_node(name, roles.get(name, MANAGER), MANAGER, is_shown=True) for name in sorted(voters)]
    if len(reachable) * 2 <= len(voters):
        return  # without a quorum there is no leader, and nothing is written
    for _ in range(2 * len(voters)):
        steps = next_steps(nodes, members("".join(sorted(voters))), reachable, own)
        going = [step.member.name for step in steps if isinstance(step, Withdraw)]
        handed = [step.to.name for step in steps if isinstance(step, TransferLeadership)]
        assert len(going) + len(handed) <= 1
        if not going and not handed:
            break
        for name in going:
            assert keeps_quorum(voters, reachable, name)
            voters.discard(name)
        for name in handed:
            assert name in voters & reachable
            own = NodeId(name)
    assert len(voters & reachable) * 2 > len(voters)


def test_a_learner_is_overdue_after_a_minute_of_this_leaders_own_time() -> None:
    learners = Learners()
    learning = members("ab", learners="b")
    assert learners.overdue(learning, 100.0) == []
    assert learners.overdue(learning, 100.0 + LEARNING_S - 1) == []
    assert learners.overdue(learning, 100.0 + LEARNING_S) == [learning[1]]
    assert learners.overdue(members("ab"), 200.0) == []
    assert learners.overdue(learning, 201.0) == [], "it has its vote, or came in anew"


def test_a_manager_whose_record_cannot_be_read_stays_one() -> None:
    nodes = [*managers("ab"), a_node("c", WORKER, MANAGER)]
    assert next_steps(nodes, members("abcd"), set("abcd"), OWN, {NodeId("c"), NodeId("d")}) == []
