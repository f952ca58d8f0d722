"""A full listener ends an old connection of whoever holds most, so that everybody else still gets in."""

from random import Random

import pytest

from skep.aio.connections.admission import Newcomers


def newcomers(most: int, most_of_source: int, **options: object) -> tuple[Newcomers[int], list[int]]:
    ended: list[int] = []
    return Newcomers("connections", most, most_of_source, ended.append, **options), ended  # type: ignore[arg-type]


def test_the_oldest_connection_of_the_source_with_most_makes_room() -> None:
    open_, ended = newcomers(most=4, most_of_source=3)
    for number, source in enumerate(("a", "b", "b", "c")):
        assert open_.admit(number, source)
    assert open_.admit(4, "d")
    assert ended == [1]
    assert set(open_) == {0, 2, 3, 4}


def test_a_source_with_its_share_makes_room_for_itself() -> None:
    open_, ended = newcomers(most=100, most_of_source=2)
    for number in range(5):
        assert open_.admit(number, "a")
    assert open_.admit(5, "b")
    assert ended == [0, 1, 2]


def test_a_connection_that_may_not_leave_keeps_its_place() -> None:
    busy = {0, 1}
    open_, ended = newcomers(most=2, most_of_source=2, may_leave=lambda one: one not in busy)
    assert open_.admit(0, "a")
    assert open_.admit(1, "a")
    assert not open_.admit(2, "b")
    busy.remove(1)
    assert open_.admit(2, "b")
    assert ended == [1]


def test_a_renewed_connection_is_the_last_to_leave_and_a_forgotten_one_is_not_ended() -> None:
    open_, ended = newcomers(most=3, most_of_source=3)
    for number in range(3):
        open_.admit(number, "a")
    open_.renew(0)
    open_.forget(1)
    open_.admit(3, "a")
    open_.admit(4, "a")
    assert ended == [2]
    assert tuple(open_) == (0, 3, 4)


@pytest.mark.parametrize("seed", range(20))
def test_strangers_never_keep_another_address_out_and_never_exceed_the_bounds(seed: int) -> None:
    random = Random(seed)
    most, most_of_source = random.randint(4, 20), random.randint(1, 8)
    open_, ended = newcomers(most, most_of_source)
    sources: dict[int, str] = {}
    for number in range(300):
        sources[number] = f"attacker {random.randint(1, 5)}"
        assert open_.admit(number, sources[number])
        if random.random() < 0.1 and len(open_):
            open_.forget(random.choice(tuple(open_)))
        assert len(open_) <= most
        held = [sources[one] for one in open_]
        assert all(held.count(source) <= most_of_source for source in held)
    sources[1000] = "a user"
    assert open_.admit(1000, "a user")
    for number in range(300, 300 + most - 2):
        sources[number] = f"attacker {random.randint(1, 5)}"
        open_.admit(number, sources[number])
    # The user holds one place, so every new stranger takes that of another one.
    attackers = len({source for source in sources.values() if source.startswith("attacker")})
    if most > attackers + 1:
        assert 1000 not in ended
