"""Which container's connections have room."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from skep.model.values.ids import ContainerId
from skep.node.container_apis.server import AdmissionDecision, Evict, decide

A, B, C = (ContainerId(one * 64) for one in "abc")


def test_a_container_has_so_many_connections_at_most() -> None:
    assert decide(A, {A: 2}, each_max=3, all_max=9) is AdmissionDecision.SERVE
    assert decide(A, {A: 3}, each_max=3, all_max=9) is AdmissionDecision.WAIT


def test_when_all_places_are_taken_who_has_most_gives_one_up() -> None:
    assert decide(C, {A: 2, B: 4}, each_max=5, all_max=6) == Evict(B)
    assert decide(A, {A: 2, B: 4}, each_max=5, all_max=6) == Evict(B)
    assert decide(A, {A: 3, B: 3}, each_max=5, all_max=6) is AdmissionDecision.WAIT


@given(st.lists(st.sampled_from([A, B, C]), max_size=60))
def test_no_sequence_of_connections_leaves_a_container_out(arrivals: list[ContainerId]) -> None:
    counts: Counter[ContainerId] = Counter()
    for id in (*arrivals, A, B, C):
        match decide(id, counts, each_max=5, all_max=6):
            case AdmissionDecision.SERVE:
                counts[id] += 1
            case Evict(other):
                counts[other] -= 1
                counts[id] += 1
        assert sum(counts.values()) <= 6
        assert max(counts.values()) <= 5
    assert min(counts[one] for one in (A, B, C)) >= 1
