"""Data keys of a real store: what lies in etcd before, during and after a rotation."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from skep.errors import FailedPrecondition
from skep.model.secret import Secret
from skep.model.values.ids import NodeId
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient, prefix_end
from skep.store.etcd.encryption import rotation
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.etcd.initialize import cluster_in
from skep.store.etcd.process.flags import MemberSettings
from skep.store.etcd.requests import PREFIX, etcd_key, is_clear
from skep.store.etcd.store import EtcdStore, open_store
from skep.store.interface import NotLeader, Term
from tests.support.store.etcd_calls import CLOCK, KEY, a_new_cluster, put_secret
from tests.support.store.etcd_rig import member_settings

pytestmark = pytest.mark.timeout(60)

SECRETS = [f"s{number:03}" for number in range(120)]


@pytest.fixture
def settings(tmp_path: Path) -> MemberSettings:
    return member_settings(tmp_path)


async def data_keys(settings: MemberSettings) -> set[int]:
    """Ids of the data keys that values in etcd are encrypted with."""
    async with EtcdClient(settings.socket) as client:
        request = pb.RangeRequest(key=PREFIX, range_end=prefix_end(PREFIX))
        kvs = (await client.range(request)).kvs
    return {int.from_bytes(kv.value[1:5], "big") for kv in kvs if not is_clear(kv.key)}


async def ring_keys(settings: MemberSettings) -> list[int]:
    async with EtcdClient(settings.socket) as client:
        return [key.id for key in (await cluster_in(client)).ring.keys]


async def wait_rotated(settings: MemberSettings, to: int) -> None:
    while await ring_keys(settings) != [to]:  # noqa: ASYNC110 - etcd announces nothing here
        await asyncio.sleep(0.01)


async def lead(store: EtcdStore) -> None:
    """Stand for election until cancelled, and do nothing with it."""
    async for _ in store.terms(NodeId("m1"), "127.0.0.1:2377"):
        pass


async def test_everything_is_encrypted_anew_and_nothing_seems_to_change(settings: MemberSettings) -> None:
    async with a_new_cluster(settings) as (_, store), asyncio.TaskGroup() as group:
        await store.update_each(put_secret, SECRETS)
        leading = group.create_task(lead(store))
        before = store.view().find(Secret)
        async with store.watch(Secret) as watch:
            await store.rotate_data_key()
            await wait_rotated(settings, to=2)
            assert await data_keys(settings) == {2}
            await store.update(put_secret, "after")
            async for commit in watch:
                (event,) = commit.events
                assert event.object.id == "after"  # type: ignore[union-attr]
                break
        assert [secret for secret in store.view().find(Secret) if secret.id != "after"] == list(before)
        leading.cancel()
    async with a_new_cluster(settings) as (_, again):
        assert [secret for secret in again.view().find(Secret) if secret.id != "after"] == list(before)


async def test_an_interrupted_rotation_goes_on_with_the_next_leader(settings: MemberSettings) -> None:
    """The first run ends with a new key in the ring and nothing re-encrypted: it has no leader."""
    async with a_new_cluster(settings) as (_, store):
        await store.update_each(put_secret, SECRETS)
        await store.rotate_data_key()
        assert await ring_keys(settings) == [1, 2]
        assert await data_keys(settings) == {1}
    async with a_new_cluster(settings) as (_, store), asyncio.TaskGroup() as group:
        assert len(store.view().find(Secret)) == len(SECRETS)
        leading = group.create_task(lead(store))
        await wait_rotated(settings, to=2)
        assert await data_keys(settings) == {2}
        leading.cancel()


async def test_a_value_that_nothing_opens_is_named_and_everything_else_is_encrypted_anew(
    settings: MemberSettings,
) -> None:
    async with a_new_cluster(settings) as (_, store), asyncio.TaskGroup() as group:
        await store.update_each(put_secret, SECRETS)
        damaged = keys.object_key("secret", SECRETS[7])
        async with EtcdClient(settings.socket) as client:
            (kv,) = (await client.range(pb.RangeRequest(key=etcd_key(damaged)))).kvs
            await client.put(kv.key, kv.value[:-3] + bytes([kv.value[-3] ^ 1]) + kv.value[-2:])
        leading = group.create_task(lead(store))
        for times in (1, 2):  # another rotation does what it can, too
            await store.rotate_data_key()
            while not store.unreadable_values:  # noqa: ASYNC110 - it announces nothing
                await asyncio.sleep(0.01)
            assert store.unreadable_values == (etcd_key(damaged).decode(),)
            assert await data_keys(settings) == {1, 1 + times}
            assert store.is_rotating, "another member may open it, with the old key"
        leading.cancel()


async def test_writes_go_on_during_a_rotation_and_none_is_lost(settings: MemberSettings) -> None:
    async with a_new_cluster(settings) as (_, store), asyncio.TaskGroup() as group:
        await store.update_each(put_secret, SECRETS)
        leading = group.create_task(lead(store))
        await store.rotate_data_key()
        written = 0
        while await ring_keys(settings) != [2]:
            await store.update(put_secret, f"during{written}")
            written += 1
        assert written
        assert await data_keys(settings) == {2}
        assert len(store.view().find(Secret)) == len(SECRETS) + written
        leading.cancel()


async def test_a_manager_that_does_not_know_of_the_new_key_writes_nothing_under_the_old_one(
    settings: MemberSettings,
) -> None:
    """Its ring is older than the store's: the first attempt is refused by the store, the second is right."""
    async with (
        a_new_cluster(settings) as (_, store),
        open_store(settings.socket, NodeId("m2"), KEY, CLOCK) as late,
    ):
        late.cipher.use = lambda *_: None  # type: ignore[method-assign]  # its watch brings nothing
        await store.rotate_data_key()
        del late.cipher.use
        assert late.cipher.ring.current == 1
        await late.update(put_secret, "late")
        async with EtcdClient(settings.socket) as client:
            reply = await client.range(pb.RangeRequest(key=etcd_key(keys.object_key("secret", "late"))))
        assert int.from_bytes(reply.kvs[0].value[1:5], "big") == 2


async def test_two_rotations_at_once_end_with_one_key(settings: MemberSettings) -> None:
    async with (
        a_new_cluster(settings) as (_, store),
        open_store(settings.socket, NodeId("m2"), KEY, CLOCK) as other,
        asyncio.TaskGroup() as group,
    ):
        await store.update_each(put_secret, SECRETS)
        leading = group.create_task(lead(store))
        await asyncio.gather(store.rotate_data_key(), other.rotate_data_key())
        await wait_rotated(settings, to=3)
        assert await data_keys(settings) == {3}
        leading.cancel()


async def a_term(store: EtcdStore) -> Term:
    async for term in store.terms(NodeId("m1"), "127.0.0.1:2377"):
        return term
    raise AssertionError("elections have ended")


async def replaced(store: EtcdStore, new: bytes) -> None:
    """Have the wrapping key replaced in whichever term; one of them may end before, on a busy machine."""
    while store.wrapping_key != new:
        with suppress(NotLeader):
            await store.replace_wrapping_key(await a_term(store), new)


async def test_the_wrapping_key_is_replaced_in_one_write_and_everything_encrypted_anew(
    settings: MemberSettings,
) -> None:
    """Another manager with the new key continues; with only the old one none starts."""
    new = new_wrapping_key()
    async with (
        a_new_cluster(settings) as (_, store),
        open_store(settings.socket, NodeId("m2"), KEY, CLOCK) as other,
        asyncio.TaskGroup() as group,
    ):
        await store.update_each(put_secret, SECRETS)
        leading = group.create_task(lead(store))
        other.learn_wrapping_key(new)
        await replaced(store, new)
        await other.update(put_secret, "other")
        assert await other.wait_rewrapped() == new
        await wait_rotated(settings, to=2)
        assert await data_keys(settings) == {2}
        await other.rotate_data_key()  # under the new one, by either
        await wait_rotated(settings, to=3)
        with pytest.raises(FailedPrecondition):
            async with open_store(settings.socket, NodeId("m3"), KEY, CLOCK):
                pass
        leading.cancel()
        for keys in (KEY + new, new):
            async with open_store(settings.socket, NodeId("m3"), keys, CLOCK) as again:
                assert len(again.view().find(Secret)) == len(SECRETS) + 1
                assert again.wrapping_key == new


async def test_a_term_that_is_over_replaces_no_wrapping_key(settings: MemberSettings) -> None:
    """Others may have been given another one meanwhile."""
    async with a_new_cluster(settings) as (_, store):
        term = await a_term(store)
        async with EtcdClient(settings.socket) as client:
            leader = (await client.range(pb.RangeRequest(key=etcd_key(keys.LEADER)))).kvs[0]
            await client.put(leader.key, leader.value)
        with pytest.raises(NotLeader):
            await store.replace_wrapping_key(term, new_wrapping_key())
        assert store.wrapping_key == KEY


async def test_a_data_key_that_has_encrypted_enough_is_replaced(
    settings: MemberSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "CHECK_S", 0.05)
    monkeypatch.setattr(rotation, "REVISIONS_PER_KEY", 20)
    async with a_new_cluster(settings) as (_, store), asyncio.TaskGroup() as group:
        leading = group.create_task(lead(store))
        for name in SECRETS[:20]:
            await store.update(put_secret, name)
        while 1 in await data_keys(settings):  # noqa: ASYNC110 - etcd announces nothing here
            await asyncio.sleep(0.01)
        leading.cancel()
