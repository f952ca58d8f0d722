"""The leader's loop over an eviction, with a store that knows of wrapping keys and others that do their parts."""

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import Unavailable, Unimplemented
from skep.manager.ca.rotation import finish as finish_rotation
from skep.manager.eviction.loop import Evictions
from skep.manager.eviction.steps import MANAGER_STEPS, Eviction, begin, eviction_of
from skep.manager.gossip.keys import first_keys
from skep.manager.routes.extensions.maintenance import EvictionBody, shown
from skep.manager.storage.keys import StoreKeys, WrappingKeys, save_wrapping_keys
from skep.model.networks.gossip import decoded_keys
from skep.model.node import (
    ManagerStatus,
    Node,
    NodeCertificate,
    NodeDescription,
    NodeRole,
    NodeSpec,
    Reachability,
)
from skep.model.swarm import EncryptionConfig, Swarm, SwarmSpec
from skep.model.values.ids import ClusterId, NodeId, new_id
from skep.model.values.times import Timestamp
from skep.paths import Paths
from skep.security.authority import Authority
from skep.security.locking import KeyLock
from skep.security.tokens import new_join_tokens
from skep.security.trust import root_digest, tls_info
from skep.store.interface import Term, Transaction
from skep.store.kinds import GOSSIP_KEYS_ID, ROOT_KEY_ID, UNLOCK_KEY_ID, Payload
from skep.store.memory import MemoryStore
from skep.wire import methods
from tests.support.harness.clocks import FastClock

OWN, OTHER, EVICTED = NodeId("manager1"), NodeId("manager2"), NodeId("manager3")
OLD = b"o" * 32
THIS = sys.modules[__name__]
finish = finish_rotation
NOW = Timestamp("2026-01-02T03:04:05Z")


class KeyedStore(MemoryStore):
    """Its values are in clear, and it knows under which wrapping key they would be."""

    wrapping_key = OLD
    is_rotating = False
    restarts_etcd = True
    """Whether managers restart their etcd when the root has changed."""
    unreadable_values: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__(SystemClock())
        self.known = {OLD}

    def learn_wrapping_key(self, key: bytes) -> None:
        self.known.add(key)

    async def wait_rewrapped(self) -> bytes:
        raise NotImplementedError

    async def replace_wrapping_key(self, term: Term, key: bytes) -> None:
        assert key in self.known
        self.wrapping_key = key


class Others:
    """The other managers, as the leader calls them."""

    def __init__(self) -> None:
        self.kept: dict[NodeId, list[bytes]] = {}
        self.error: Exception | None = None
        self.on_call: Callable[[], Any] | None = None

    def channel(self, manager: NodeId) -> Any:
        others = self

        class Called:
            async def call(self, method: Any, request: Any, *, timeout_s: float) -> None:
                assert method is methods.KEEP_WRAPPING_KEY
                if others.error is not None:
                    raise others.error
                if others.on_call is not None:
                    await others.on_call()
                others.kept.setdefault(manager, []).append(request.key)

        return Called()


def a_manager(id: NodeId) -> Node:
    return Node(
        id=id,
        spec=NodeSpec(role=NodeRole.MANAGER),
        description=NodeDescription(hostname=id.replace("manager", "m")),
        certificate=NodeCertificate(role=NodeRole.MANAGER, state="issued"),
        manager_status=ManagerStatus(reachability=Reachability.REACHABLE, addr=f"{id}:1"),
    )


@pytest.fixture
async def store() -> KeyedStore:
    store, authority = KeyedStore(), Authority.create()

    def found(tx: Transaction) -> None:
        spec = SwarmSpec(encryption_config=EncryptionConfig(auto_lock_managers=True))
        root = authority.root_pem
        tx.put(
            Swarm(id=ClusterId("c"), spec=spec, tls_info=tls_info(root), join_tokens=new_join_tokens(root))
        )
        tx.put(Payload(id=ROOT_KEY_ID, data=authority.key_pem))
        tx.put(Payload(id=UNLOCK_KEY_ID, data=b"u" * 32))
        for id in (OWN, OTHER, EVICTED):
            tx.put(a_manager(id))

    await store.update(found)
    return store


@pytest.fixture
def keys(tmp_path) -> WrappingKeys:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    save_wrapping_keys(paths, OLD)
    assert not KeyLock(paths).is_on
    return WrappingKeys(paths)


async def do_their_parts(store: KeyedStore) -> None:
    """The loops beside: roles, the rotation of the root, and etcds that are restarted."""

    def parts(tx: Transaction) -> None:
        swarm = tx.get(Swarm, ClusterId("c"))
        if swarm.rotation is not None:
            finish_rotation(tx, swarm.rotation.root, new_id)
            swarm = tx.get(Swarm, ClusterId("c"))
        digest = root_digest(swarm.tls_info.trust_root.encode())
        for node in tx.find(Node):
            if node.spec.role is NodeRole.WORKER and node.manager_status is not None:
                former = NodeCertificate(role=NodeRole.WORKER)
                tx.put(replace(node, manager_status=None, certificate=former))
            elif node.peer_roots != digest and store.restarts_etcd:
                tx.put(replace(node, peer_roots=digest))

    while True:
        await store.update(parts)
        await asyncio.sleep(0.005)


@asynccontextmanager
async def led(store: KeyedStore, keys: WrappingKeys, others: Others) -> AsyncIterator[None]:
    """One term of leadership."""
    evictions = Evictions(
        store,  # type: ignore[arg-type]  # a plain store will do, without the fence
        OWN,
        StoreKeys(store, keys),
        others.channel,
        FastClock(50),
        new_id,
        Random(1),
    )
    running = [asyncio.create_task(evictions.run()), asyncio.create_task(do_their_parts(store))]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def present(store: KeyedStore) -> Eviction:
    eviction = eviction_of(store.view())
    assert eviction is not None
    return eviction


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - several writers, none of which tells
            await asyncio.sleep(0.005)


async def test_everything_that_the_node_knew_is_another_thing_afterwards(store, keys):
    others = Others()
    before = store.view().get(Swarm, ClusterId("c"))
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, others):
        await until(lambda: present(store).next_step is None)
    view = store.view()
    after = view.get(Swarm, ClusterId("c"))
    assert present(store).done == MANAGER_STEPS
    assert view.lookup(Node, EVICTED) is None
    assert after.tls_info != before.tls_info
    assert after.spec.ca_config.force_rotate == before.spec.ca_config.force_rotate + 1
    assert after.join_tokens.manager != before.join_tokens.manager
    assert after.join_tokens.worker != before.join_tokens.worker
    assert view.get(Payload, UNLOCK_KEY_ID).data != b"u" * 32
    assert others.kept == {OTHER: [store.wrapping_key]}
    assert keys.load() == OLD + store.wrapping_key


async def test_what_a_worker_knew_is_another_thing_afterwards(store, keys):
    """The token that it joined with, and the keys of docker nodes."""
    before, gossip = store.view().get(Swarm, ClusterId("c")), first_keys(random.randbytes, NOW)
    await store.update(
        lambda tx: [tx.put(a_worker("w1")), tx.put(Payload(id=GOSSIP_KEYS_ID, data=gossip.encode()))]
    )
    await store.update(begin, "w1", "root@desk", OWN, NOW)
    async with led(store, keys, Others()):
        await until(lambda: present(store).next_step is None)
    view = store.view()
    after = view.get(Swarm, ClusterId("c"))
    assert view.lookup(Node, "w1") is None
    assert after.join_tokens.worker != before.join_tokens.worker
    assert after.join_tokens.manager != before.join_tokens.manager
    assert decoded_keys(view.get(Payload, GOSSIP_KEYS_ID).data) != gossip
    assert (after.tls_info, store.wrapping_key) == (before.tls_info, OLD), "it never had their keys"


@pytest.mark.parametrize("steps", range(len(MANAGER_STEPS)))
async def test_the_next_leader_goes_on_wherever_one_ended(store, keys, steps):
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, Others()):
        await until(lambda: len(present(store).done) >= steps)
    async with led(store, keys, Others()):
        await until(lambda: present(store).next_step is None)
    assert store.wrapping_key != OLD


async def test_a_manager_that_is_away_is_waited_for_and_named(store, keys):
    """The store stays under the old key until every manager has the new one on its disk."""
    others = Others()
    others.error = Unavailable("manager manager2 cannot be reached")
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, others):
        await until(lambda: "m2" in present(store).waits_for)
        assert present(store).done == ("remove",)
        assert store.wrapping_key == OLD
        others.error = None
        await until(lambda: present(store).next_step is None)
    assert len(keys.load()) == 2 * 32, "the same key was offered each time"


def a_worker(id: str) -> Node:
    return Node(id=NodeId(id), description=NodeDescription(hostname=id), certificate=NodeCertificate())


async def test_a_worker_that_is_switched_off_keeps_no_other_eviction_from_going_on(store, keys, monkeypatch):
    """It is waited for with the root alone, which both evictions need; it has the new one when it is back."""
    monkeypatch.setattr(THIS, "finish_rotation", finish_when_renewed)
    fourth = NodeId("manager4")
    await store.update(lambda tx: [tx.put(a_worker("w1")), tx.put(a_manager(fourth))])
    others = Others()
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, others):
        await until(lambda: "w1" in present(store).waits_for)
        assert present(store).done == ("remove", "keys", "data")
        assert (await store.update(begin, "m3", "root@desk", OWN, NOW)).node_id == EVICTED, (
            "it is gone, and goes on"
        )
        first, offered = store.wrapping_key, others.kept[fourth]
        await store.update(begin, "m4", "root@desk", OWN, NOW)
        await until(lambda: store.view().lookup(Node, fourth) is None and "w1" in present(store).waits_for)
        assert store.wrapping_key not in (first, *offered), (
            "the second one knew the key that the first was shut out by"
        )
        assert present(store).others == (EVICTED,)
        await store.update(begin, EVICTED, "root@desk", OWN, NOW)  # asked again: it goes on
        assert present(store).node_id == fourth
        await store.update(lambda tx: tx.delete(Node, "w1"))
        await until(lambda: present(store).next_step is None)
    roots = store.view().get(Swarm, ClusterId("c")).tls_info.trust_root.encode()
    assert root_digest(roots) not in present(store).roots
    assert len(present(store).roots) == 2, (
        "the root, and the one that was on its way when the second was to go"
    )


def finish_when_renewed(tx: Transaction, root: str, ids: Any) -> bool:
    """The rotation of the root waits for a worker that is away."""
    return tx.lookup(Node, "w1") is None and finish(tx, root, ids)


async def test_a_value_that_nothing_opens_is_named_and_holds_nothing_up(store, keys):
    store.is_rotating, store.unreadable_values = True, ("o/secret/abc/spec",)
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, Others()):
        await until(lambda: present(store).next_step is None)
    assert present(store).damaged == ("o/secret/abc/spec",)
    assert shown(present(store)).damaged == ("o/secret/abc/spec",)


async def test_the_new_root_comes_when_everything_is_under_the_new_key(store, keys):
    """Its key would be written beside values that the node can still read."""
    before = store.view().get(Swarm, ClusterId("c")).tls_info
    store.is_rotating = True
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, Others()):
        await until(lambda: "re-encrypted" in present(store).waits_for)
        assert present(store).done == ("remove", "keys")
        assert store.view().get(Swarm, ClusterId("c")).tls_info == before
        store.is_rotating = False
        await until(lambda: present(store).next_step is None)


async def test_managers_whose_etcd_still_trusts_the_old_root_are_waited_for_and_named(store, keys):
    store.restarts_etcd = False
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, Others()):
        await until(lambda: "restart etcd one after another: m1, m2" in present(store).waits_for)
        assert present(store).done == ("remove", "keys", "data", "root")
        store.restarts_etcd = True
        await until(lambda: present(store).next_step is None)


async def test_an_older_manager_is_named_and_nothing_is_replaced(store, keys):
    others = Others()
    others.error = Unimplemented("unknown method")
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, others):
        await until(lambda: "upgrade it" in present(store).waits_for)
    assert store.wrapping_key == OLD


async def test_a_manager_that_comes_in_meanwhile_has_the_key_before_it_is_used(store, keys):
    others, late = Others(), NodeId("manager4")

    async def comes_in() -> None:
        await store.update(lambda tx: tx.put(a_manager(late)))

    others.on_call = comes_in
    await store.update(begin, "m3", "root@desk", OWN, NOW)
    async with led(store, keys, others):
        await until(lambda: present(store).next_step is None)
    assert others.kept[OTHER] == others.kept[late] == [store.wrapping_key]


@pytest.mark.parametrize("names", [("RequestedBy", "KeepContainers"), ("By", "Keep")])
async def test_commands_of_earlier_versions_keep_containers_too(names):
    body = msgspec.json.decode(
        msgspec.json.encode({"Node": "n", names[0]: "ann", names[1]: True}), type=EvictionBody
    )
    assert (body.user, body.is_kept) == ("ann", True)
