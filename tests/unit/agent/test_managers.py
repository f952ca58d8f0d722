"""Which manager a node tries next."""

from random import Random

import pytest

from skep.agent.session.managers import KnownManager, ManagerList, next_manager
from skep.errors import Unavailable
from skep.model.node import RESPONSE_SECONDS_MAX
from skep.model.node_reports.conditions import NO_QUORUM
from skep.model.values.ids import NodeId

OWN, M2, M3 = (KnownManager(NodeId(f"m{number}"), f"10.0.0.{number}:2377") for number in (1, 2, 3))


def chosen(failures: dict[str, int]) -> set[str]:
    random = Random(7)
    return {next_manager([OWN, M2, M3], failures, OWN.node_id, random).node_id for _ in range(50)}


def test_this_machines_own_manager_comes_last():
    assert chosen({}) == {"m2", "m3"}


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({M2.addr: 1}, {"m3"}),
        ({M2.addr: 1, M3.addr: 1}, {"m1"}),
        ({M2.addr: 1, M3.addr: 1, OWN.addr: 1}, {"m2", "m3"}),
    ],
)
def test_a_failed_manager_is_tried_after_the_others(failures, expected):
    assert chosen(failures) == expected


def test_without_managers_there_is_none_to_try():
    assert next_manager([], {}, OWN.node_id, Random(1)) is None


def test_a_new_list_replaces_the_old_one_and_is_announced_once():
    received = []
    managers = ManagerList([OWN], received.append)
    managers.replace([M3, M2, M2])
    managers.replace([M2, M3])
    assert managers.peers == (M2, M3)
    assert received == [(M2, M3)]


def test_an_empty_list_is_ignored():
    managers = ManagerList([OWN])
    managers.replace([])
    managers.replace([KnownManager(NodeId("m9"), "")])
    assert managers.peers == (OWN,)


def test_failures_are_forgotten_when_a_session_came_about():
    managers = ManagerList([OWN, M2])
    for _ in range(3):
        managers.failed(M2)
    assert managers.choose(OWN.node_id, Random(1)) == OWN
    managers.worked(OWN)
    assert managers.choose(OWN.node_id, Random(1)) == M2


def test_a_round_ends_when_all_managers_were_tried_equally_often():
    managers = ManagerList([OWN, M2, M3])
    managers.failed(M2)
    assert not managers.is_last_of_round(M2)
    managers.failed(M3)
    managers.failed(OWN)
    assert managers.is_last_of_round(OWN)


def test_dead_managers_together_cost_no_longer_than_a_single_one_while_others_answer() -> None:
    managers = ManagerList([OWN, M2, M3])
    for _ in range(4):
        managers.failed(M2, was_connected=False)
        managers.failed(M3, was_connected=False)
    managers.failed(OWN)
    assert managers.connect_timeout(M2) + managers.connect_timeout(M3) == RESPONSE_SECONDS_MAX


def test_without_responses_each_manager_gets_the_timeout_of_a_crowded_one() -> None:
    managers = ManagerList([M2, M3])
    for _ in range(4):
        managers.failed(M2, was_connected=False)
        managers.failed(M3, was_connected=False)
    assert managers.connect_timeout(M2) == RESPONSE_SECONDS_MAX


def test_a_manager_that_no_list_has_is_accepted_only_while_none_of_the_list_responds():
    managers = ManagerList([OWN, M2])
    stranger = NodeId("m9")
    with pytest.raises(Unavailable, match="is manager m9, which is not among the managers of this cluster"):
        managers.require_manager(M2, stranger)
    managers.failed(M2)
    with pytest.raises(Unavailable):
        managers.require_manager(M2, stranger)
    managers.failed(OWN, was_connected=False)
    managers.require_manager(M2, stranger)
    managers.worked(OWN)
    with pytest.raises(Unavailable):
        managers.require_manager(M2, stranger)


def test_managers_that_swapped_addresses_and_unnamed_ones_are_accepted():
    managers = ManagerList([OWN, M2, KnownManager(NodeId(""), "10.0.0.9:2377")])
    managers.require_manager(M2, OWN.node_id)
    managers.require_manager(managers.peers[2], NodeId("m9"))
    managers.require_manager(M2, NodeId(""))


def test_managers_without_a_quorum_are_named_instead_of_new_addresses() -> None:
    shown: list[str] = []
    managers = ManagerList([OWN, M2, M3], show_unreached=shown.append)
    managers.failed(M2, was_connected=False, reason="cannot reach 10.0.0.2:2377: timed out")
    managers.failed(M3, reason=NO_QUORUM)
    managers.note_unreached()
    assert "with a leader: 10.0.0.3:2377 has lost contact with the others" in shown[-1]
    assert "skep status" in shown[-1]
    managers.failed(M3, was_connected=False, reason="cannot reach 10.0.0.3:2377: timed out")
    managers.note_unreached()
    assert "this node tries 10.0.0.1:2377, 10.0.0.2:2377, 10.0.0.3:2377" in shown[-1]
    assert "its configuration file (default: /etc/skep/skep.toml)" in shown[-1]
