"""The store on a real etcd: kills and freezes, encryption, founding, damage."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from skep.errors import AlreadyExists, FailedPrecondition, Unavailable
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.values.ids import ConfigId, NodeId, SecretId
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.etcd.initialize import InitUnfinished, initialize, raise_incarnation
from skep.store.etcd.membership import RaftMembers
from skep.store.etcd.process.flags import MemberSettings
from skep.store.etcd.requests import PREFIX, etcd_key
from skep.store.etcd.store import open_store
from skep.store.interface import Transaction
from skep.store.kinds import Payload
from skep.store.leadership import LeaderRecord
from tests.support.store.etcd_calls import (
    CLOCK,
    KEY,
    NODE,
    a_new_cluster,
    a_secret,
    found,
    freeze,
    pid_of,
    put_secret,
    until,
)
from tests.support.store.etcd_rig import a_member, member_settings


@pytest.fixture
def settings(tmp_path: Path) -> MemberSettings:
    return member_settings(tmp_path)


async def test_acknowledged_writes_survive_the_kill_of_etcd(settings: MemberSettings) -> None:
    """The store's users only see a pause; no write is lost or doubled."""
    acknowledged: list[str] = []
    async with a_new_cluster(settings) as (member, store):
        first = pid_of(member)

        async def write() -> None:
            for number in range(200):
                await store.update(put_secret, f"s{number:03}")
                acknowledged.append(f"s{number:03}")

        async with asyncio.TaskGroup() as group:
            writing = group.create_task(write())
            for _ in range(3):
                enough = len(acknowledged) + 20
                await until(lambda enough=enough: len(acknowledged) >= enough)
                os.kill(first, signal.SIGKILL)
                await until(lambda killed=first: member.pid not in {None, killed})
                first = pid_of(member)
            await writing
        assert member.starts >= 4
        assert [secret.id for secret in store.view().find(Secret)] == acknowledged
    async with a_new_cluster(settings) as (_, again):
        assert [secret.id for secret in again.view().find(Secret)] == acknowledged


async def test_leadership_and_its_fence_come_back_after_the_kill_of_etcd(settings: MemberSettings) -> None:
    """The new term has a new fence; the old one's writes are refused."""
    async with a_new_cluster(settings) as (member, store):
        terms = store.terms(NODE, "127.0.0.1:2377")
        first = await anext(terms)
        await first.update(put_secret, "before")
        os.kill(pid_of(member), signal.SIGKILL)
        # raft's term grew, so the same manager leads again under a new fence only if it lost the old one.
        async with asyncio.timeout(20):
            await first.update(put_secret, "after")
        assert store.view().lookup(Secret, "after") is not None


async def test_a_frozen_etcd_is_no_answer_and_no_double_write(settings: MemberSettings) -> None:
    """SIGSTOP: writes fail within their deadline; after SIGCONT everything goes on."""
    async with a_new_cluster(settings) as (member, store):
        await freeze(pid_of(member))
        try:
            async with asyncio.timeout(7):
                with pytest.raises(Unavailable, match="does not have a leader"):
                    await store.update(put_secret, "frozen")
        finally:
            os.kill(pid_of(member), signal.SIGCONT)
        await store.barrier()
        found_before = store.view().lookup(Secret, "frozen")
        if found_before is None:
            await store.update(put_secret, "frozen")
        assert [secret.id for secret in store.view().find(Secret)] == ["frozen"]


async def test_the_only_member_is_not_called_before_a_read(settings: MemberSettings) -> None:
    """All writes are acknowledged by its own store; that is over as soon as another member is added."""
    async with a_member(settings).running() as member, EtcdClient(settings.socket) as client:
        await initialize(settings.socket, KEY, CLOCK, found)
        members = RaftMembers(client, member)
        await members.count()
        async with open_store(
            settings.socket, NODE, KEY, CLOCK, is_only_member=members.is_only_member
        ) as store:
            await store.update(put_secret, "s")
            await freeze(pid_of(member))
            try:
                await store.barrier()
            finally:
                os.kill(pid_of(member), signal.SIGCONT)
            await members.add("m2", "https://m2:2378")
            await store.barrier()
            await freeze(pid_of(member))
            try:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await store.barrier()
            finally:
                os.kill(pid_of(member), signal.SIGCONT)


async def test_a_write_during_a_short_freeze_is_written_once(settings: MemberSettings) -> None:
    """Longer than the write's own deadline, shorter than the update's: its outcome is found out."""
    ids = iter(f"s{number}" for number in range(10))

    def create(tx: Transaction) -> Secret:
        return tx.put(replace(a_secret("one"), id=SecretId(next(ids))))

    async with a_new_cluster(settings) as (member, store):
        await store.update(put_secret, "warm")
        await freeze(pid_of(member))
        async with asyncio.TaskGroup() as group:
            creating = group.create_task(store.update(create))
            await asyncio.sleep(1.5)  # the fault itself: a pause longer than one write may take
            os.kill(pid_of(member), signal.SIGCONT)
        assert creating.result().id == "s0"
        assert [secret.id for secret in store.view().find(Secret)] == ["s0", "warm"]


async def test_values_at_rest_are_encrypted(settings: MemberSettings) -> None:
    async with a_new_cluster(settings) as (_, store):

        def fill(tx: Transaction) -> None:
            tx.put(Payload(id="secret/s", data=b"correct horse battery staple"))
            tx.put(
                replace(a_secret("visible-name"), spec=SecretSpec(name="visible-name", labels={"k": "plain"}))
            )

        await store.update(fill)
        async with EtcdClient(settings.socket) as client:
            reply = await client.range(pb.RangeRequest(key=PREFIX, range_end=b"/skep/v2"))
    stored = {kv.key: kv.value for kv in reply.kvs}
    assert etcd_key("o/secret/visible-name") in stored
    everything = b"".join(stored.values())
    for word in (b"correct horse", b"Y29ycmVjdCBob3Jz", b"plain", b"service", KEY):
        assert word not in everything
    disk = b"".join(path.read_bytes() for path in settings.data.rglob("*") if path.is_file())
    assert b"correct horse" not in disk


async def test_a_store_without_a_format_is_an_unfinished_init(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        with pytest.raises(InitUnfinished, match="not finished"):
            async with open_store(settings.socket, NODE, KEY, CLOCK):
                pytest.fail("opened")


async def test_a_cluster_is_founded_once(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        await initialize(settings.socket, KEY, CLOCK, found)
        with pytest.raises(AlreadyExists):
            await initialize(settings.socket, KEY, CLOCK, found)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (keys.FORMAT, b"2", "have format 2"),
        (keys.LEVEL, b"9", "is at level 9"),
        (keys.LEVEL, b"x", "damaged"),
    ],
)
async def test_what_this_version_does_not_know_is_refused(
    settings: MemberSettings, key: str, value: bytes, reason: str
) -> None:
    async with a_member(settings).running():
        await initialize(settings.socket, KEY, CLOCK, found)
        async with EtcdClient(settings.socket) as client:
            await client.put(etcd_key(key), value)
        with pytest.raises(FailedPrecondition, match=reason):
            async with open_store(settings.socket, NODE, KEY, CLOCK):
                pytest.fail("opened")


async def test_another_clusters_key_opens_nothing(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        await initialize(settings.socket, KEY, CLOCK, found)
        with pytest.raises(FailedPrecondition, match="another cluster"):
            async with open_store(settings.socket, NODE, new_wrapping_key(), CLOCK):
                pytest.fail("opened")


async def test_many_large_objects_are_loaded_page_by_page(settings: MemberSettings) -> None:
    def put_config(tx: Transaction, number: int) -> Config:
        id = ConfigId(f"c{number:02}")
        return tx.put(Config(id=id, spec=ConfigSpec(name=id, data=bytes([number]) * 1000 * 1024)))

    async with a_new_cluster(settings) as (_, store):
        await store.update_each(put_config, range(20))
        expected = store.view().find(Config)
    async with a_new_cluster(settings) as (_, again):
        assert again.view().find(Config) == expected
        assert len(expected) == 20


async def test_a_damaged_value_is_skipped_and_affects_no_other(settings: MemberSettings) -> None:
    async with a_new_cluster(settings) as (_, store):
        for name in ("a", "b", "c"):
            await store.update(put_secret, name)
        async with EtcdClient(settings.socket) as client:
            whole = await client.range(pb.RangeRequest(key=etcd_key("o/secret/a")))
            await client.put(etcd_key("o/secret/b"), whole.kvs[0].value)  # moved from another key
            await client.put(etcd_key("o/secret/c"), b"nonsense")
        await store.barrier()
        await store.update(put_secret, "d")
        assert [secret.id for secret in store.view().find(Secret)] == ["a", "b", "c", "d"]
    async with a_new_cluster(settings) as (_, again):
        assert [secret.id for secret in again.view().find(Secret)] == ["a", "d"]


async def test_in_a_new_incarnation_a_record_of_a_later_raft_term_bars_no_leader(
    settings: MemberSettings,
) -> None:
    """Raft's terms begin anew in a restored store; the record of who led is from before."""
    async with a_member(settings).running():
        await initialize(settings.socket, KEY, CLOCK, found)
        async with open_store(settings.socket, NODE, KEY, CLOCK) as store:
            cipher = store.cipher
            name = etcd_key(keys.LEADER)
            record = msgspec.json.encode(LeaderRecord(node=NodeId("m9"), term=1_000_000))
            async with EtcdClient(settings.socket) as client:
                await client.put(name, cipher.encrypt(name, record))
        assert await raise_incarnation(settings.socket, 77) == 77
        assert await raise_incarnation(settings.socket, 5) == 78
        async with open_store(settings.socket, NODE, KEY, CLOCK) as store, asyncio.timeout(10):
            assert store.incarnation == 78
            await anext(store.terms(NODE, "127.0.0.1:2377"))
