"""The checker of registers: histories that have an order, and some that have none."""

from math import inf

from sim.invariants.linearizable import Operation, is_linearizable


def read(began: float, returned: float, seen: str | None) -> Operation:
    return Operation(began, returned, expects=seen, is_seen=True)


def write(began: float, returned: float, value: str) -> Operation:
    return Operation(began, returned, writes=value, is_write=True)


def swap(began: float, returned: float, before: str | None, value: str) -> Operation:
    return Operation(began, returned, expects=before, is_seen=True, writes=value, is_write=True)


def test_nothing_and_one_after_the_other() -> None:
    assert is_linearizable([])
    assert is_linearizable([write(0, 1, "a"), read(2, 3, "a"), swap(4, 5, "a", "b"), read(6, 7, "b")])


def test_a_read_that_misses_what_was_acknowledged_before_it_has_no_order() -> None:
    assert not is_linearizable([write(0, 1, "a"), read(2, 3, None)])
    assert is_linearizable([write(0, 2, "a"), read(1, 3, None)])


def test_two_readers_see_two_writes_in_the_same_order() -> None:
    writes = [write(0, 9, "a"), write(0, 9, "b")]
    assert is_linearizable([*writes, read(1, 2, "a"), read(3, 4, "b")])
    assert not is_linearizable([*writes, read(1, 2, "a"), read(3, 4, "b"), read(5, 6, "a")])


def test_two_swaps_cannot_both_have_replaced_the_same_value() -> None:
    assert not is_linearizable([swap(0, 3, None, "a"), swap(1, 3, None, "b")])
    assert is_linearizable([swap(0, 3, None, "a"), swap(1, 3, "a", "b")])


def test_an_operation_without_a_response_may_take_effect_late_or_never() -> None:
    lost = write(0, inf, "a")
    assert is_linearizable([lost, read(5, 6, None), read(7, 8, "a")])
    assert is_linearizable([lost, read(5, 6, None), read(7, 8, None)])
    assert not is_linearizable([lost, read(5, 6, "a"), write(6.5, 6.6, "b"), read(7, 8, "a")])


def test_what_began_later_does_not_come_first() -> None:
    assert not is_linearizable([read(0, 1, "a"), write(2, inf, "a")])


def test_a_register_may_hold_something_to_begin_with() -> None:
    assert is_linearizable([read(0, 1, "x")], first="x")
