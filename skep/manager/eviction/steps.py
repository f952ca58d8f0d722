"""An eviction, as the store keeps it, and its steps.  Pure but for the transaction functions.

The order is the point.  A manager has had the wrapping key, and every data key; whatever is encrypted under one of them
is readable to who has a later image of a disk.  So after the node is gone the data keys come first, and only what is
written under the new ones (the root's key, tokens, the unlock key, docker nodes' keys) is new to it.

Each step may be interrupted and done again.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec
from msgspec.structs import replace

from skep.errors import FailedPrecondition, NotFound
from skep.manager.ca.standing import is_manager
from skep.manager.cluster import cluster_of
from skep.manager.control.nodes import check_demotion, remove_node
from skep.manager.gossip.keys import rotated
from skep.model.gossip import decoded_keys
from skep.model.ids import NodeId
from skep.model.node import Node, NodeRole
from skep.model.swarm import Swarm
from skep.model.times import Timestamp
from skep.security.trust import root_digest
from skep.store.interface import Transaction, View
from skep.store.kinds import GOSSIP_KEYS_ID, Payload, Revocation

EVICTION_ID = "eviction"
"""Id of the payload that keeps the last eviction."""

Step = Literal["remove", "keys", "data", "root", "restarts", "tokens", "unlock", "overlays"]

TEXTS: Mapping[Step, str] = {
    "remove": "the node is removed, and its certificates are taken back",
    "keys": "every other manager has a new wrapping key, and the store a new data key",
    "data": "everything in the store is encrypted anew",
    "root": "every node has a certificate of a new root, and join tokens are new",
    "restarts": "every manager's etcd has been restarted with the new root",
    "tokens": "join tokens are new",
    "unlock": "the unlock key is new, if managers are locked",
    "overlays": "no node exchanges encrypted traffic with it, and docker nodes have new keys",
}
OF_A_MANAGER: tuple[Step, ...] = ("remove", "keys", "data", "root", "restarts", "unlock", "overlays")
OF_A_WORKER: tuple[Step, ...] = ("remove", "tokens", "overlays")
"""It never had a key of the managers."""
OF_SEVERAL: tuple[Step, ...] = (*OF_A_MANAGER[:5], "tokens", *OF_A_MANAGER[5:])
"""The root may have been another one, and tokens with it, before the last of them was evicted."""


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """One eviction.  ``roots``: digests of the roots whose keys the node may have."""

    node_id: NodeId
    hostname: str
    was_manager: bool
    asked_by: str
    """Who asked, as the client says."""
    asked_through: NodeId
    asked_at: Timestamp
    roots: tuple[str, ...] = ()
    done: tuple[Step, ...] = ()
    waits_for: str = ""
    """What the present step waits for, in a sentence; empty: it is under way."""
    others: tuple[NodeId, ...] = ()
    """Nodes whose evictions were not complete when this one began, and are part of it now."""
    damaged: tuple[str, ...] = ()
    """Keys of values in the store that no data key opens: they are left as they are."""

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """All that are evicted."""
        return (self.node_id, *self.others)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        if not self.was_manager:
            return OF_A_WORKER
        return OF_SEVERAL if self.others else OF_A_MANAGER

    @property
    def next_step(self) -> Step | None:
        """The first that is not done; None: it is complete."""
        return next((step for step in self.steps if step not in self.done), None)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


def eviction_of(view: View) -> Eviction | None:
    """The last one, complete or not."""
    payload = view.lookup(Payload, EVICTION_ID)
    return decoded_eviction(payload) if payload is not None else None


def is_evicting_manager(view: View) -> bool:
    """Whether the eviction of a manager is under way; one that cannot be read is none."""
    try:
        eviction = eviction_of(view)
    except FailedPrecondition:
        return False
    return eviction is not None and eviction.was_manager and eviction.next_step is not None


def decoded_eviction(payload: Payload) -> Eviction:
    """Raises: FailedPrecondition: it is damaged, or has steps that this version does not know."""
    try:
        return msgspec.json.decode(payload.data, type=Eviction)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"this version of Skep cannot read the eviction: {error}") from error


def begin(tx: Transaction, word: str, by: str, own: NodeId, now: Timestamp) -> Eviction:
    """Begin to evict the node that ``word`` names, or go on; a node that was removed already is named by its id.

    One that is under way, perhaps waiting for a node that is switched off, becomes part of this one.

    Raises: NotFound; FailedPrecondition: it is the node that was asked.
    """
    present = _stored(tx)
    swarm = cluster_of(tx)
    under_way = present if present is not None and present.next_step is not None else None
    if under_way is not None and word == under_way.hostname and not tx.find(Node, name=word.lower()):
        return under_way
    target = _target(tx, word)
    if under_way is not None and target.id in under_way.nodes:
        return under_way
    if target.id == own:
        raise FailedPrecondition("a manager cannot evict itself: run this on another manager")
    was_manager = _was_manager(tx, target)
    if target.spec.role is NodeRole.MANAGER and tx.lookup(Node, target.id) is not None:
        check_demotion(tx, target)
    roots = [swarm.tls_info.trust_root, *((swarm.rotation.root,) if swarm.rotation else ())]
    eviction = Eviction(
        node_id=target.id,
        hostname=target.description.hostname,
        was_manager=was_manager,
        asked_by=by,
        asked_through=own,
        asked_at=now,
        roots=tuple(root_digest(root.encode()) for root in roots),
    )
    if under_way is not None:
        eviction = joined(under_way, eviction)
    tx.put(Payload(id=EVICTION_ID, data=eviction.encode()))
    return eviction


def joined(earlier: Eviction, later: Eviction) -> Eviction:
    """``later``, and with it what is left of ``earlier``.

    A manager had all keys, those that were made meanwhile too: everything is done again.  After a worker nothing is but
    what its own eviction takes.
    """
    if later.was_manager:
        done: tuple[Step, ...] = ()
    else:
        done = tuple(step for step in earlier.done if step not in OF_A_WORKER)
    return replace(
        later,
        was_manager=later.was_manager or earlier.was_manager,
        roots=tuple(dict.fromkeys((*earlier.roots, *later.roots) if later.was_manager else earlier.roots)),
        others=tuple(dict.fromkeys(earlier.nodes)),
        done=done,
        damaged=() if later.was_manager else earlier.damaged,
    )


def _target(tx: Transaction, word: str) -> Node:
    """The node; one that is gone has nothing but its id."""
    nodes = list(tx.find(Node))
    for matches in (
        [node for node in nodes if node.id == word],
        [node for node in nodes if node.description.hostname == word],
        [node for node in nodes if node.id.startswith(word)],
    ):
        if len(matches) > 1:
            raise FailedPrecondition(f"node {word} is ambiguous ({len(matches)} matches found)")
        if matches:
            return matches[0]
    revocation = tx.lookup(Revocation, word)
    if revocation is None or not revocation.is_removed:
        raise NotFound(f"node {word} not found")
    return Node(id=NodeId(word))


def _was_manager(tx: Transaction, node: Node) -> bool:
    """Whether the node may have keys of the managers: it is one, or was one until its certificates expire."""
    revocation = tx.lookup(Revocation, node.id)
    has_been = revocation is not None and bool(revocation.serials)
    issued = node.certificate is not None and bool(node.certificate.serials)
    return has_been or issued or node.spec.role is NodeRole.MANAGER


def _stored(tx: Transaction) -> Eviction | None:
    payload = tx.lookup(Payload, EVICTION_ID)
    return decoded_eviction(payload) if payload is not None else None


def note_done(tx: Transaction, node_id: NodeId, step: Step) -> None:
    """A step is done."""
    present = _stored(tx)
    if present is not None and present.node_id == node_id and step not in present.done:
        changed = replace(present, done=(*present.done, step), waits_for="")
        tx.put(Payload(id=EVICTION_ID, data=changed.encode()))


def note_damaged(tx: Transaction, node_id: NodeId, keys: tuple[str, ...]) -> None:
    """Which values stay as they are because nothing opens them."""
    present = _stored(tx)
    if present is not None and present.node_id == node_id and present.damaged != keys:
        tx.put(Payload(id=EVICTION_ID, data=replace(present, damaged=keys).encode()))


def note_waiting(tx: Transaction, node_id: NodeId, reason: str) -> None:
    """What the present step waits for."""
    present = _stored(tx)
    if present is not None and present.node_id == node_id and present.waits_for != reason:
        tx.put(Payload(id=EVICTION_ID, data=replace(present, waits_for=reason).encode()))


def remove_evicted(tx: Transaction, node_ids: Iterable[NodeId], now_ns: int) -> str:
    """Demote the nodes, then remove them; gives what that waits for, nothing when they are gone."""
    return "".join(dict.fromkeys([_remove(tx, id, now_ns) for id in node_ids]))


def _remove(tx: Transaction, node_id: NodeId, now_ns: int) -> str:
    node = tx.lookup(Node, node_id)
    if node is None:
        return ""
    if node.spec.role is NodeRole.MANAGER:
        check_demotion(tx, node)
        tx.put(replace(node, spec=replace(node.spec, role=NodeRole.WORKER)))
    if node.spec.role is NodeRole.MANAGER or is_manager(node) or node.manager_status is not None:
        return "the managers take its vote back"
    remove_node(tx, node_id, force=True, now_ns=now_ns)
    return ""


def has_new_root(eviction: Eviction, swarm: Swarm) -> bool:
    """Whether the cluster trusts roots only whose keys the node never had."""
    return swarm.rotation is None and root_digest(swarm.tls_info.trust_root.encode()) not in eviction.roots


def is_on_its_way(eviction: Eviction, swarm: Swarm) -> bool:
    """Whether the rotation under way leads to such a root."""
    return swarm.rotation is not None and root_digest(swarm.rotation.root.encode()) not in eviction.roots


def names(nodes: Iterable[Node], most: int = 5) -> str:
    """``w1, w2 and 7 more``"""
    found = sorted(node.description.hostname or str(node.id) for node in nodes)
    more = len(found) - most
    return ", ".join(found[:most]) + (f" and {more} more" if more > 0 else "")


def replace_gossip_keys(tx: Transaction, now: Timestamp, random_bytes: Callable[[int], bytes]) -> None:
    """New keys for the gossip of docker nodes and for their encrypted overlay networks, if there are such nodes."""
    gossip = tx.lookup(Payload, GOSSIP_KEYS_ID)
    if gossip is not None:
        fresh = rotated(decoded_keys(gossip.data), random_bytes, now)
        tx.put(Payload(id=GOSSIP_KEYS_ID, data=fresh.encode()))
