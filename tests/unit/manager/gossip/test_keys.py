"""The keys of docker nodes' gossip."""

from itertools import count

from skep.manager.gossip.keys import ROTATION_S, SUBSYSTEMS, first_keys, rotated, seconds_to_rotation
from skep.model.networks.gossip import GossipKeys, decoded_keys
from skep.model.values.times import SECOND_NS, timestamp

NOW = timestamp(1_700_000_000 * SECOND_NS)


def numbered() -> object:
    numbers = count(1)
    return lambda size: next(numbers).to_bytes(size, "big")


def times(keys: GossipKeys, subsystem: str) -> list[int]:
    return [key.lamport_time for key in keys.keys if key.subsystem == subsystem]


def test_a_cluster_begins_with_three_keys_per_subsystem() -> None:
    keys = first_keys(numbered(), NOW)  # type: ignore[arg-type]
    assert times(keys, "networking:gossip") == [1, 2, 3]
    assert times(keys, "networking:ipsec") == [4, 5, 6]
    assert {len(key.key) for key in keys.keys} == {16}


def test_a_rotation_drops_the_oldest_key_and_keeps_what_engines_encrypt_with() -> None:
    rng = numbered()
    before = first_keys(rng, NOW)  # type: ignore[arg-type]
    after = rotated(before, rng, NOW)  # type: ignore[arg-type]
    for subsystem, fresh in zip(SUBSYSTEMS, (7, 8), strict=True):
        old = [key for key in before.keys if key.subsystem == subsystem]
        new = [key for key in after.keys if key.subsystem == subsystem]
        assert new[:2] == old[1:]
        assert new[2].lamport_time == fresh
    assert len({key.key for key in (*before.keys, *after.keys)}) == 8


def test_numbers_stay_unique_over_many_rotations() -> None:
    rng = numbered()
    keys = first_keys(rng, NOW)  # type: ignore[arg-type]
    for _ in range(5):
        keys = rotated(keys, rng, NOW)  # type: ignore[arg-type]
        assert len({key.lamport_time for key in keys.keys}) == 6


def test_another_leaders_clock_never_delays_a_rotation_beyond_its_period() -> None:
    keys = first_keys(numbered(), NOW)  # type: ignore[arg-type]
    an_hour_later = timestamp((1_700_000_000 + 3600) * SECOND_NS)
    assert seconds_to_rotation(keys, an_hour_later) == ROTATION_S - 3600
    a_day_before = timestamp((1_700_000_000 - 24 * 3600) * SECOND_NS)
    assert seconds_to_rotation(keys, a_day_before) == ROTATION_S
    a_day_later = timestamp((1_700_000_000 + 24 * 3600) * SECOND_NS)
    assert seconds_to_rotation(keys, a_day_later) == 0


def test_keys_survive_the_store_and_are_never_printed() -> None:
    keys = first_keys(numbered(), NOW)  # type: ignore[arg-type]
    assert decoded_keys(keys.encode()) == keys
    assert repr(keys.keys[0]) == "GossipKey(subsystem='networking:gossip', lamport_time=1)"
