"""What keys of encrypted overlays are derived from, when they rotate, and who gets which."""

import random
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from skep.manager.discovery.encrypted_members import EncryptedMembers
from skep.manager.discovery.overlay_keys import (
    ROTATION_S,
    KeyRing,
    decoded_ring,
    first_ring,
    pair_keys,
    rotated,
    seconds_to_rotation,
    wireguard_private,
    wireguard_public,
)
from skep.model.ids import NetworkId, NodeId
from skep.model.meta import Driver
from skep.model.network import Network, NetworkSpec
from skep.model.overlays import is_encrypted
from skep.model.pair_keys import (
    EPOCHS_KEPT,
    KEY_BYTES,
    KeysTold,
    NodeKeys,
    PeerKeys,
    after,
)
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.times import SECOND_NS, timestamp
from skep.store.interface import Commit, Created, Deleted, Updated
from skep.wire.convert.overlay_keys import keys_from_pb, keys_to_pb
from tests.support.builders import a_task

T0 = 1_700_000_000
A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def at(seconds: float) -> str:
    return timestamp(int((T0 + seconds) * SECOND_NS))


def a_ring(rotations: int = 0, seed: int = 1) -> KeyRing:
    chance = random.Random(seed).randbytes
    ring = first_ring(chance, at(0), 1)
    for number in range(1, rotations + 1):
        ring = rotated(ring, chance, at(number * ROTATION_S), 1)
    return ring


def test_a_ring_keeps_three_epochs_whose_numbers_grow() -> None:
    assert [one.epoch for one in a_ring().secrets] == [T0]
    ring = a_ring(5)
    assert len(ring.secrets) == EPOCHS_KEPT
    epochs = [one.epoch for one in ring.secrets]
    assert epochs == sorted(set(epochs))
    assert len({one.secret for one in ring.secrets}) == EPOCHS_KEPT
    assert a_ring(4).secrets[1:] == ring.secrets[:2]


def test_epochs_grow_even_if_the_clock_goes_back_or_two_rotations_are_within_a_second() -> None:
    chance = random.Random(1).randbytes
    ring = first_ring(chance, at(0), 1)
    for seconds in (0, 0, -86_400, 0.5):
        ring = rotated(ring, chance, at(seconds), 1)
    assert [one.epoch for one in ring.secrets] == [T0 + 2, T0 + 3, T0 + 4]


def test_rotation_is_due_after_its_period_and_at_once_in_a_new_life_of_the_cluster() -> None:
    ring = a_ring()
    assert seconds_to_rotation(ring, at(3600), 1) == ROTATION_S - 3600
    assert seconds_to_rotation(ring, at(ROTATION_S + 5), 1) == 0
    assert seconds_to_rotation(ring, at(-86_400), 1) == ROTATION_S, "another leader's clock was ahead"
    assert seconds_to_rotation(ring, at(1), 1, period_s=3.0) == 2.0
    assert seconds_to_rotation(ring, at(1), 2) == 0


def test_an_old_backups_ring_leads_to_an_epoch_that_nobody_has_dropped() -> None:
    backup, lived_on = a_ring(1), a_ring(9)
    restored = rotated(backup, random.Random(2).randbytes, at(10 * ROTATION_S), 2)
    assert restored.secrets[-1].epoch > max(one.epoch for one in lived_on.secrets)


def test_both_nodes_of_a_pair_have_the_same_keys_crosswise() -> None:
    ring = a_ring(2)
    for here, there in zip(pair_keys(ring, A, B), pair_keys(ring, B, A), strict=True):
        assert here.epoch == there.epoch
        assert here.sending == there.receiving
        assert here.receiving == there.sending


def test_no_two_pairs_directions_or_epochs_share_a_key() -> None:
    ring = a_ring(2)
    nodes = [NodeId(name) for name in ("a", "b", "c", "ab", "bc", "a\0b")]
    keys = [key for one, other in combinations(nodes, 2) for key in pair_keys(ring, one, other)]
    every = [part for key in keys for part in (key.sending, key.receiving)]
    assert len(set(every)) == len(every)
    assert {len(part) for part in every} == {KEY_BYTES}


def test_wireguard_keys_stay_over_rotations_and_differ_between_nodes() -> None:
    chance = random.Random(3).randbytes
    ring = first_ring(chance, at(0), 1)
    later = rotated(ring, chance, at(ROTATION_S), 1)
    assert wireguard_private(ring, A) == wireguard_private(later, A) != wireguard_private(ring, B)
    assert len(wireguard_public(ring, A)) == KEY_BYTES


def test_secrets_survive_the_store_and_the_wire_and_are_never_printed() -> None:
    ring = a_ring(2)
    assert decoded_ring(ring.encode()) == ring
    told = KeysTold(
        peers=(PeerKeys(node_id=B, keys=pair_keys(ring, A, B), wireguard_public=wireguard_public(ring, B)),),
        removed=(C,),
        is_complete=True,
        wireguard_private=wireguard_private(ring, A),
    )
    assert keys_from_pb(keys_to_pb(told)) == told
    shown = repr((ring, told, pair_keys(ring, A, B), ring.secrets, after(NodeKeys(), told), told.peers))
    secrets = [one.secret for one in ring.secrets] + [ring.wireguard, told.wireguard_private]
    secrets += [part for key in pair_keys(ring, A, B) for part in (key.sending, key.receiving)]
    assert [one for one in secrets if repr(one)[2:-1] in shown] == []


def test_what_a_node_is_told_adds_up() -> None:
    ring = a_ring()
    b, c = (PeerKeys(node_id=one, keys=pair_keys(ring, A, one)) for one in (B, C))
    keys = after(NodeKeys(), KeysTold(peers=(b, c), is_complete=True))
    assert keys.peers == {B: b, C: c}
    assert after(keys, KeysTold(removed=(B,))).peers == {C: c}
    assert after(keys, KeysTold(peers=(b,), is_complete=True)).peers == {B: b}


# --- who shares a network ---------------------------------------------------------------------------------------


def a_network(id: str, *, encrypted: bool = True) -> Network:
    options = {"encrypted": ""} if encrypted else {}
    return Network(
        id=NetworkId(id),
        spec=NetworkSpec(name=id, driver_configuration=Driver(name="overlay", options=options)),
    )


NETWORKS = {id: a_network(id, encrypted=id != "plain") for id in ("x", "y", "plain")}


def on(id: str, node: str, *networks: str, state: TaskState = TaskState.RUNNING) -> Task:
    attached = tuple(NetworkAttachment(network=NETWORKS[one], addresses=("10.0.0.2/24",)) for one in networks)
    task = a_task(id, node=node, state=state)
    return task.__class__(
        **{
            **{name: getattr(task, name) for name in task.__struct_fields__},
            "networks_attachments": attached,
        }
    )


def members_of(*tasks: Task) -> EncryptedMembers:
    members = EncryptedMembers()
    members.note(Commit(1, tuple(Created(one) for one in (*tasks, *NETWORKS.values()))))
    return members


def test_a_network_is_encrypted_if_the_option_is_there_whatever_its_value() -> None:
    assert is_encrypted(a_network("x"))
    assert not is_encrypted(a_network("x", encrypted=False))
    assert not is_encrypted(Network(id=NetworkId("x")))


def test_nodes_are_peers_while_they_share_an_encrypted_network() -> None:
    members = members_of(
        on("1", "a", "x"), on("2", "b", "x", "plain"), on("3", "c", "plain"), on("4", "b", "y")
    )
    assert members.peers(A) == {B}
    assert members.peers(B) == {A}
    assert members.peers(C) == frozenset()
    ended = on("2", "b", "x", "plain", state=TaskState.SHUTDOWN)
    assert members.note(Commit(2, (Updated(on("2", "b", "x"), ended),))) == {A, B}
    assert members.peers(A) == members.peers(B) == frozenset()


def test_a_task_without_a_node_or_not_assigned_is_nowhere() -> None:
    members = members_of(on("1", "a", "x"), on("2", "b", "x", state=TaskState.PENDING), on("3", "", "x"))
    assert members.peers(A) == frozenset()


STATES = (TaskState.PENDING, TaskState.ASSIGNED, TaskState.RUNNING, TaskState.FAILED)
TASKS = st.builds(
    lambda name, node, networks, state: on(name, node, *networks, state=state),
    st.sampled_from("12345"),
    st.sampled_from("abc"),
    st.sets(st.sampled_from(("x", "y", "plain"))),
    st.sampled_from(STATES),
)


@settings(max_examples=200)
@given(st.lists(st.tuples(TASKS, st.booleans()), max_size=15))
def test_commit_by_commit_gives_what_the_whole_gives_and_wakes_everybody_concerned(
    changes: list[tuple[Task, bool]],
) -> None:
    members = members_of()
    present: dict[str, Task] = {}
    for revision, (task, is_removed) in enumerate(changes, 2):
        before = {node: members.peers(node) for node in (A, B, C)}
        old = present.pop(task.id, None)
        if is_removed:
            events = (Deleted(old),) if old is not None else ()
        else:
            present[task.id] = task
            events = (Updated(old, task) if old is not None else Created(task),)
        woken = members.note(Commit(revision, events))
        fresh = members_of(*present.values())
        for node in (A, B, C):
            assert members.peers(node) == fresh.peers(node)
            assert members.peers(node) == before[node] or node in woken
