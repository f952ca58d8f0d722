"""The arithmetic of a quorum, for one to nine managers, even numbers included."""

import pytest

from skep.manager.membership.roles import keeps_quorum, quorum

TABLE = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 7: 3, 8: 3, 9: 4}


@pytest.mark.parametrize(("voters", "loss"), TABLE.items())
def test_the_tolerated_loss_leaves_a_quorum_and_one_more_does_not(voters: int, loss: int) -> None:
    assert voters - quorum(voters) == loss
    assert voters - loss >= quorum(voters)
    assert voters - loss - 1 < quorum(voters)


@pytest.mark.parametrize("voters", range(1, 10))
def test_two_quorums_always_have_a_member_in_common(voters: int) -> None:
    assert 2 * quorum(voters) > voters


@pytest.mark.parametrize(
    ("voters", "reachable", "leaving", "stays"),
    [
        ("abc", "abc", "a", True),
        ("abc", "ab", "c", True),  # the dead one goes
        ("abc", "ab", "a", False),  # of b and c only b would answer
        ("ab", "ab", "b", True),
        ("a", "a", "a", False),  # the last one
        ("abcde", "abc", "e", True),
        ("abcde", "abc", "a", False),
        ("abcd", "abc", "d", True),
        ("abcd", "abc", "a", True),
    ],
)
def test_a_member_goes_only_if_the_rest_decides(
    voters: str, reachable: str, leaving: str, stays: bool
) -> None:
    assert keeps_quorum(set(voters), set(reachable), leaving) is stays


def test_a_learner_may_always_go_while_there_is_a_quorum() -> None:
    assert keeps_quorum({"a"}, {"a"}, "learner")
    assert not keeps_quorum({"a", "b"}, {"a"}, "learner")
