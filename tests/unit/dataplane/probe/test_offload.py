"""When a network card is taken to be at fault."""

from itertools import product

import pytest

from skep.dataplane.probe.measurements import TRIALS, Offload, after_success, after_trials, is_suspect
from skep.model.values.ids import NodeId

PEER, OTHER = NodeId("p"), NodeId("o")


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_only_a_card_that_fails_whenever_it_is_asked_and_never_else_is_switched_off(left: int) -> None:
    for arrived in product((True, False), repeat=left):
        is_off = after_trials(Offload(), PEER, arrived).is_off
        assert is_off == (arrived == tuple(not by_card for by_card in TRIALS))


def test_a_way_on_which_it_does_not_help_is_not_tried_again_until_it_was_well() -> None:
    known = after_trials(Offload(), PEER, [False])
    assert not is_suspect(known, PEER, bare_arrives=True, checked_arrives=False)
    assert is_suspect(known, OTHER, bare_arrives=True, checked_arrives=False)
    again = after_success(known, PEER)
    assert is_suspect(again, PEER, bare_arrives=True, checked_arrives=False)


def test_chance_is_no_reason() -> None:
    """The card works in its own trial."""
    known = after_trials(Offload(), PEER, [True, True])
    assert known == Offload()


@pytest.mark.parametrize(("bare", "checked"), [(False, False), (True, True), (False, True)])
def test_what_is_lost_without_checksums_or_arrives_with_them_is_not_the_cards(
    bare: bool, checked: bool
) -> None:
    assert not is_suspect(Offload(), PEER, bare_arrives=bare, checked_arrives=checked)


def test_what_is_off_stays_off() -> None:
    assert not is_suspect(Offload(is_off=True), PEER, bare_arrives=True, checked_arrives=False)
    assert after_success(Offload(is_off=True), PEER).is_off
