"""What the leader does about the room that the stores have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.model.values.ids import NodeId
from skep.store.space import (
    ALARM_GAIN,
    COMPACT_AT,
    Compact,
    Defragment,
    Disarm,
    HandOver,
    MemberSpace,
    next_step,
    refusal,
    warning,
)

QUOTA = 1000
A, B, C = map(NodeId, "abc")


def space(size: int, in_use: int, *, has_alarm: bool = False) -> MemberSpace:
    return MemberSpace(size=size, in_use=in_use, quota=QUOTA, has_alarm=has_alarm)


SMALL, SPARSE = space(100, 90), space(800, 300)


def test_nothing_is_done_while_there_is_room() -> None:
    assert next_step(A, {A: SMALL, B: SMALL}) is None


@pytest.mark.parametrize(("in_use", "kept"), [(500, 1000), (650, 10), (900, 0)])
def test_the_fuller_the_store_the_less_history_is_left(in_use: int, kept: int) -> None:
    full = space(950, in_use)
    assert next_step(A, {A: full}) == Compact(kept)
    assert not isinstance(next_step(A, {A: full}, can_compact=False), Compact)


def test_one_store_at_a_time_is_defragmented_the_leaders_last_and_not_while_it_leads() -> None:
    assert next_step(A, {A: SPARSE, B: SMALL, C: SPARSE}) == Defragment(C)
    assert next_step(A, {A: SPARSE, B: SMALL, C: SMALL}) == HandOver(B)
    assert next_step(B, {A: SPARSE, B: SMALL, C: SMALL}) == Defragment(A)
    assert next_step(A, {A: SPARSE}) == Defragment(A)


def test_a_file_that_would_not_shrink_is_left_alone() -> None:
    assert next_step(A, {A: space(450, 100)}) is None
    assert next_step(A, {A: space(800, 790)}, can_compact=False) is None


def test_an_alarm_ends_when_every_file_has_room() -> None:
    armed, full = space(300, 200, has_alarm=True), space(950, 940, has_alarm=True)
    assert next_step(A, {A: armed, B: armed}) == Disarm()
    assert next_step(A, {A: armed, B: full}) is None
    sparse = space(950, 920, has_alarm=True)
    assert next_step(A, {A: sparse}, can_compact=False) == Defragment(A)


@given(st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 1), st.booleans()), min_size=1, max_size=3))
def test_steps_that_are_taken_come_to_an_end(files: list[tuple[int, float, bool]]) -> None:
    """A compaction frees what it can, a defragmentation all that is free, and alarms end: then nothing is to do."""
    members = {
        NodeId(f"m{n}"): space(size, int(size * share), has_alarm=alarm)
        for n, (size, share, alarm) in enumerate(files)
    }
    own, can_compact = NodeId("m0"), True
    for _ in range(20):
        match next_step(own, members, can_compact=can_compact):
            case None:
                break
            case Compact():
                can_compact = False
            case Defragment(id):
                members[id] = space(members[id].in_use, members[id].in_use, has_alarm=members[id].has_alarm)
            case HandOver(to):
                own = to
            case Disarm():
                members = {id: space(one.size, one.in_use) for id, one in members.items()}
    else:
        pytest.fail("it never ends")
    assert can_compact is False or members[own].share < COMPACT_AT
    assert ALARM_GAIN > 0


def test_users_are_warned_and_then_refused_what_makes_it_grow() -> None:
    assert (refusal(space(990, 700), creates=True), refusal(space(900, 850), creates=False)) == ("", "")
    assert "85 % full" in refusal(space(900, 850), creates=True)
    assert "96 % full" in refusal(space(990, 960), creates=False)
    assert (warning(SMALL), warning(space(990, 650))) == ("", "")
    assert "75 % full" in warning(space(800, 750))
    assert "quota" in warning(space(100, 90, has_alarm=True))


def test_writes_that_together_reach_the_limit_are_refused_before_the_first() -> None:
    mib = 2**20
    found = MemberSpace(size=1600 * mib, in_use=1520 * mib, quota=2000 * mib)
    assert refusal(found, creates=True) == ""
    assert refusal(found, creates=True, adds=79 * mib) == ""
    assert "76 % full (1.5 of 2.0 GiB), too full for 80.0 MiB more: remove" in refusal(
        found, creates=True, adds=80 * mib
    )
    assert refusal(found, creates=False, adds=80 * mib) == ""
    full = MemberSpace(size=1700 * mib, in_use=1700 * mib, quota=2000 * mib)
    assert "85 % full (1.7 of 2.0 GiB): remove" in refusal(full, creates=True, adds=mib)
