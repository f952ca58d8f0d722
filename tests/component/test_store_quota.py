"""A real etcd that is driven to its quota goes on, takes what the cluster writes, and comes back by itself."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import ResourceExhausted, Unavailable
from skep.manager.storage.store_space import StoreSpace
from skep.model.secret import Config, ConfigSpec
from skep.model.service import Service
from skep.model.values.ids import ConfigId, NodeId
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.etcd.errors import OutOfSpace
from skep.store.etcd.initialize import initialize
from skep.store.etcd.membership import RaftMembers
from skep.store.etcd.process.member import EtcdMember
from skep.store.etcd.store import EtcdStore, open_store
from skep.store.interface import Transaction
from skep.store.space import REFUSE_AT, MemberSpace, refusal
from skep.store.transactions.transaction import LocalTransaction
from skep.wire.client import ManagerChannel
from tests.support.builders import a_service
from tests.support.harness.clocks import FastClock
from tests.support.store.etcd_rig import a_member, member_settings
from tests.support.store.store_rigs import found

pytestmark = [pytest.mark.needs("etcd", "setpriv"), pytest.mark.timeout(120)]

QUOTA = 16 * 1024**2
OWN = NodeId("m1")
LARGE = b"x" * 1_000_000


class Rig:
    def __init__(self, store: EtcdStore, client: EtcdClient, member: EtcdMember) -> None:
        self.store = store
        self.client = client
        self.member = member

    async def raw_put(self, number: int) -> None:
        """As no part of Skep writes: counted by etcd's quota."""
        put = pb.PutRequest(key=b"/raw/%d" % number, value=LARGE)
        await self.client.call("KV/Put", pb.PutResponse, put, 5.0)

    async def fill(self) -> None:
        """Raises: OutOfSpace."""
        for number in range(100):
            await self.raw_put(number % 4)


async def wait_until(rig: Rig, is_so: Callable[[MemberSpace], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so(await rig.store.space()):  # noqa: ASYNC110 (there is no event)
            await asyncio.sleep(0.1)


@asynccontextmanager
async def a_full_store(root: Path) -> AsyncIterator[Rig]:
    settings = replace(member_settings(root), quota_bytes=QUOTA)
    key, clock = new_wrapping_key(), SystemClock()
    async with AsyncExitStack() as stack:
        member = await stack.enter_async_context(a_member(settings).running())
        await initialize(settings.socket, key, clock, found)
        opening = open_store(settings.socket, OWN, key, clock, quota_bytes=QUOTA)
        store = await stack.enter_async_context(opening)
        client = await stack.enter_async_context(EtcdClient(settings.socket))
        yield Rig(store, client, member)


@asynccontextmanager
async def kept(rig: Rig) -> AsyncIterator[None]:
    """With a leader that sees to the space."""

    def nobody(_: NodeId) -> ManagerChannel:
        raise Unavailable("there is no other manager")

    keeper = StoreSpace(rig.store, OWN, RaftMembers(rig.client, rig.member), nobody, FastClock(20))
    keeping = asyncio.create_task(keeper.keep())
    try:
        yield
    finally:
        keeping.cancel()


async def create_config(rig: Rig, number: int) -> ConfigId:
    """As the API does it."""
    id = ConfigId(f"c{number}")
    if why := refusal(await rig.store.space(), creates=True):
        raise ResourceExhausted(why)
    config = Config(id=id, spec=ConfigSpec(name=id, data=LARGE))
    await rig.store.update(lambda tx: tx.put(config))
    return id


def labeled(tx: Transaction, number: int) -> None:
    web = tx.get(Service, "web")
    tx.put(replace(web, spec=replace(web.spec, labels={"n": f"{number}"})))


async def test_configs_made_and_removed_again_and_again_never_fill_the_store(tmp_path: Path) -> None:
    async with a_full_store(tmp_path) as rig, kept(rig):
        await rig.store.update(lambda tx: tx.put(a_service("web")))
        made = 0
        while made < 40:
            try:
                id = await create_config(rig, made)
            except ResourceExhausted:
                await rig.store.update(labeled, made)  # the cluster itself goes on
                await asyncio.sleep(0.1)
                continue
            made += 1
            await rig.store.update(LocalTransaction.delete, Config, id)
        await rig.store.update(labeled, made)
        await wait_until(rig, lambda space: space.share < REFUSE_AT and space.size < QUOTA)
        assert not (await rig.store.space()).has_alarm
        await create_config(rig, made + 1)


async def test_an_alarm_about_space_stops_nothing_and_ends_by_itself(tmp_path: Path) -> None:
    async with a_full_store(tmp_path) as rig:
        await rig.store.update(lambda tx: tx.put(a_service("web")))
        with pytest.raises(OutOfSpace):
            await rig.fill()
        assert (await rig.store.space()).has_alarm
        await rig.store.update(labeled, 1)
        await rig.client.put(b"/skep/v1/w/m1", b"")  # a ticket is moved
        await rig.member.restart(rig.member.settings)  # and the member comes up again
        async with asyncio.timeout(10):
            await rig.store.update(labeled, 2)
        async with kept(rig):
            await wait_until(rig, lambda space: not space.has_alarm)
        await rig.raw_put(0)
        assert rig.store.view().get(Service, "web").spec.labels == {"n": "2"}


async def test_an_alarm_that_was_cleared_is_not_seen_again(tmp_path: Path) -> None:
    """A leader that saw it once more would clear it once more, and so on."""
    async with a_full_store(tmp_path) as rig:
        member = (await rig.client.status()).header.member_id
        raised = pb.AlarmRequest(action=pb.AlarmRequest.ACTIVATE, memberID=member, alarm=pb.NOSPACE)
        await rig.client.call("Maintenance/Alarm", pb.AlarmResponse, raised, 5.0)
        assert (await rig.store.space()).has_alarm
        await rig.store.disarm()
        assert not (await rig.store.space()).has_alarm


async def test_what_was_measured_before_an_alarm_was_cleared_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_full_store(tmp_path) as rig:
        status, is_cleared = await rig.store.client.status(), asyncio.Event()
        status.errors.append("alarm:NOSPACE")

        async def before() -> pb.StatusResponse:
            await is_cleared.wait()
            return status

        with monkeypatch.context() as patched:
            patched.setattr(rig.store.client, "status", before)
            measuring = asyncio.create_task(rig.store.space())
            await asyncio.sleep(0)
            await rig.store.disarm()
            is_cleared.set()
            assert (await measuring).has_alarm
        assert not (await rig.store.space()).has_alarm
