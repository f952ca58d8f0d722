"""The search for the largest packet that arrives, and what overlays make of what was found."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.plan.probe import number_of
from skep.dataplane.probe.measurements import (
    Measurements,
    Range,
    initial_range,
    narrowed,
    next_sizes,
    path_mtu,
    recheck_sizes,
)
from skep.dataplane.probe.packets import PeerMeasurements
from skep.model.networks.paths import MTU_MIN
from skep.model.values.ids import NodeId

A, B, C, D = (NodeId(name) for name in "abcd")


def searched(device: int, arrives: Callable[[int], bool]) -> tuple[int, int]:
    """What is found, and in how many rounds."""
    known, rounds = initial_range(device), 0
    while wanted := next_sizes(known):
        assert len(wanted) <= 8
        assert all(known.arrives < size < known.too_large for size in wanted)
        known = narrowed(known, wanted, [size for size in wanted if arrives(size)])
        rounds += 1
    return known.arrives, rounds


@given(st.integers(MTU_MIN, 65535), st.data())
def test_the_mtu_of_any_way_is_found_in_few_rounds(device: int, data: st.DataObject) -> None:
    mtu = data.draw(st.integers(MTU_MIN, device))
    found, rounds = searched(device, lambda size: size <= mtu)
    assert found == mtu
    assert rounds <= (5 if device <= 1500 else 7)


def test_where_devices_report_their_mtu_one_round_is_enough() -> None:
    assert searched(1500, lambda size: True) == (1500, 1)


def test_where_nothing_large_arrives_nothing_is_found() -> None:
    assert searched(1500, lambda size: False) == (0, 1)


@given(st.integers(MTU_MIN, 9000), st.randoms(use_true_random=False))
def test_chance_never_makes_the_search_endless_nor_finds_what_did_not_arrive(device: int, rng) -> None:  # type: ignore[no-untyped-def]
    arrived = set()

    def arrives(size: int) -> bool:
        if rng.random() < 0.5:
            arrived.add(size)
            return True
        return False

    found, rounds = searched(device, arrives)
    assert found == 0 or found in arrived
    assert rounds < 20


def test_what_arrived_is_tried_again_with_some_of_what_is_larger() -> None:
    assert recheck_sizes(1500, 1500) == (1500,)
    wanted = recheck_sizes(1400, 1500)
    assert wanted[0] == 1400
    assert all(1400 < size <= 1500 for size in wanted[1:])
    assert len(wanted) == 9
    assert narrowed(Range(1400, 1501), wanted, wanted).arrives > 1490


def test_a_network_has_its_smallest_path_mtu_from_any_node() -> None:
    """A and B are a way of 1400 apart; C reaches both with 1500."""
    at_a = Measurements(
        {B: 1400, C: 1500}, {B: PeerMeasurements(1500, {number_of(A): 1400}), C: PeerMeasurements(1500)}
    )
    at_c = Measurements(
        {A: 1500, B: 1500},
        {A: PeerMeasurements(1500, {number_of(B): 1400}), B: PeerMeasurements(1500, {number_of(A): 1400})},
    )
    assert path_mtu(at_a, (A, B, C), A, 1500) == 1400
    assert path_mtu(at_c, (A, B, C), C, 1500) == 1400
    assert path_mtu(at_c, (A, C), C, 1500) == 1500, "B is not on this network"
    assert path_mtu(at_c, (B, C), C, 1500) == 1500


def test_a_smaller_device_elsewhere_counts_and_unmeasured_paths_do_not() -> None:
    assert path_mtu(Measurements({B: 1500}, {B: PeerMeasurements(1450)}), (A, B, D), A, 9000) == 1450
    assert path_mtu(Measurements(), (A, B), A, 9000) == 9000


@given(st.dictionaries(st.sampled_from((B, C, D)), st.integers(0, 9000)), st.integers(100, 9000))
def test_it_is_never_more_than_a_way_carries_nor_less_than_any_does(
    own: dict[NodeId, int], device: int
) -> None:
    found = path_mtu(Measurements(own), (A, B, C, D), A, device)
    assert found >= MTU_MIN
    assert all(found <= max(mtu, MTU_MIN) for mtu in own.values() if mtu)
