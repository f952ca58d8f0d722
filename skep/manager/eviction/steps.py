"""The stored form of an eviction, and its steps.  Pure, except for the transaction functions.

The order matters.  A manager has had the wrapping key and every data key, so whoever gets a disk image later can read
everything that is encrypted with one of them.  Therefore the data keys are replaced first, right after the node is
removed.  The new root key, tokens, unlock key and keys of docker nodes are written with the new data keys only, so the
node cannot know them.

Each step may be interrupted and repeated.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.errors import FailedPrecondition, NotFound
from skep.manager.ca.caller_check import is_manager
from skep.manager.cluster import cluster_of
from skep.manager.control.nodes import check_demotion, remove_node
from skep.manager.gossip.keys import rotated
from skep.model.networks.gossip import decoded_keys
from skep.model.node import Node, NodeRole, NodeState
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp
from skep.model.volume import Volume, VolumeScope
from skep.security.trust import is_issued_by, root_digest
from skep.store.interface import Transaction, View
from skep.store.kinds import GOSSIP_KEYS_ID, NEXT_ROOT_KEY_ID, ROOT_KEY_ID, Payload, Revocation

EVICTION_ID = "eviction"
"""Id of the payload with the last eviction."""

Step = Literal["remove", "keys", "data", "root", "restarts", "tokens", "unlock", "overlays"]

TEXTS: Mapping[Step, str] = {
    "remove": "the node is removed, and its certificates are revoked",
    "keys": "every other manager has a new wrapping key, and the store a new data key",
    "data": "everything in the store is re-encrypted",
    "root": "every node has a certificate of a new root, and join tokens are new",
    "restarts": "every manager's etcd has been restarted with the new root",
    "tokens": "join tokens are new",
    "unlock": "the unlock key is new, if managers are locked",
    "overlays": "no node exchanges encrypted traffic with it, and docker nodes have new keys",
}
MANAGER_STEPS: tuple[Step, ...] = ("remove", "keys", "data", "root", "restarts", "unlock", "overlays")
WORKER_STEPS: tuple[Step, ...] = ("remove", "tokens", "overlays")
"""Steps of a worker's eviction.  A worker never had a key of the managers."""
SEVERAL_NODES_STEPS: tuple[Step, ...] = (*MANAGER_STEPS[:5], "tokens", *MANAGER_STEPS[5:])
"""Steps of the eviction of several nodes.  The tokens are replaced again, because they may have been replaced before
the last node was evicted.
"""

NO_ROOT_KEY = "the external CA of the current root must sign the next one: run docker swarm ca --rotate"
Action: TypeAlias = Literal["rotate", "replace gossip keys"]
"""Start a rotation, or replace the docker nodes' keys although the root is not replaced yet."""


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """One eviction.  ``roots`` has the digests of the roots whose keys the node may have."""

    node_id: NodeId
    hostname: str
    was_manager: bool
    asked_by: str
    """The user who requested it, as reported by the client."""
    asked_through: NodeId
    asked_at: Timestamp
    roots: tuple[str, ...] = ()
    done: tuple[Step, ...] = ()
    waits_for: str = ""
    """Sentence about what the current step waits for.  Empty if it is running."""
    others: tuple[NodeId, ...] = ()
    """Nodes whose incomplete evictions became part of this one."""
    damaged: tuple[str, ...] = ()
    """Keys of values that no data key decrypts.  These values are not changed."""
    keeping: tuple[NodeId, ...] = ()
    """Nodes whose containers keep running in addition to their replacements."""

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """All evicted nodes."""
        return (self.node_id, *self.others)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in order."""
        if not self.was_manager:
            return WORKER_STEPS
        return SEVERAL_NODES_STEPS if self.others else MANAGER_STEPS

    @property
    def next_step(self) -> Step | None:
        """The first step that is not done, or None if the eviction is complete."""
        return next((step for step in self.steps if step not in self.done), None)

    def encode(self) -> bytes:
        """Return the JSON for a ``Payload``, which ``decoded_eviction`` reads."""
        return msgspec.json.encode(self)


def eviction_of(view: View) -> Eviction | None:
    """Return the last eviction, complete or not, or None."""
    payload = view.lookup(Payload, EVICTION_ID)
    return decoded_eviction(payload) if payload is not None else None


def is_evicting_manager(view: View) -> bool:
    """Whether a manager is being evicted.  False if the eviction is unreadable."""
    try:
        eviction = eviction_of(view)
    except FailedPrecondition:
        return False
    return eviction is not None and eviction.was_manager and eviction.next_step is not None


def decoded_eviction(payload: Payload) -> Eviction:
    """Decode a payload.  Raises FailedPrecondition if it is damaged, or has steps of another version."""
    try:
        return msgspec.json.decode(payload.data, type=Eviction)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"this version of Skep cannot read the eviction: {error}") from error


def begin(
    tx: Transaction, name: str, by: str, own: NodeId, now: Timestamp, *, keeps_containers: bool = False
) -> Eviction:
    """Begin or continue the eviction of the node with this ``name`` or id.  A removed node is named by its id.

    An eviction in progress, which may wait for a node that is off, becomes part of this one.

    Raises:
        NotFound: No node has the name or id.
        FailedPrecondition: It is this manager's own node, or ``keeps_containers`` is set and a volume for a single node
            is on it.
    """
    present = _stored(tx)
    swarm = tx.get(Swarm, cluster_of(tx).id)  # the recorded roots must be the current ones
    under_way = present if present is not None and present.next_step is not None else None
    if under_way is not None and name == under_way.hostname and not tx.find(Node, name=name.lower()):
        return under_way
    target = _target(tx, name)
    if under_way is not None and target.id in under_way.nodes:
        return under_way
    if target.id == own:
        raise FailedPrecondition("a manager cannot evict itself: run this on another manager")
    if keeps_containers:
        _check_volumes(tx, target)
    was_manager = _was_manager(tx, target)
    if target.spec.role is NodeRole.MANAGER and tx.lookup(Node, target.id) is not None:
        check_demotion(tx, target)
    eviction = Eviction(
        node_id=target.id,
        hostname=target.description.hostname,
        was_manager=was_manager,
        asked_by=by,
        asked_through=own,
        asked_at=now,
        roots=_known_roots(tx, swarm),
        keeping=(target.id,) if keeps_containers else (),
    )
    if under_way is not None:
        eviction = merged(under_way, eviction)
    tx.put(Payload(id=EVICTION_ID, data=eviction.encode()))
    return eviction


def _check_volumes(tx: Transaction, node: Node) -> None:
    """Raise FailedPrecondition if a single-node volume is on the node, since its containers would keep writing."""
    for volume in tx.find(Volume):
        is_single = volume.spec.access_mode.scope is VolumeScope.SINGLE
        if is_single and volume.status_on(node.id) is not None:
            raise FailedPrecondition(
                f"its containers cannot be kept: single-node volume {volume.spec.name} is on "
                f"{names([node])}. Evict the node without --keep, or drain it first."
            )


def _known_roots(tx: Transaction, swarm: Swarm) -> tuple[str, ...]:
    """Return the digests of the roots whose keys were in the store.  The key of an external CA was never on a node."""
    keyed = [(ROOT_KEY_ID, swarm.tls_info.trust_root)]
    if swarm.rotation is not None:
        keyed.append((NEXT_ROOT_KEY_ID, swarm.rotation.root))
    return tuple(root_digest(root.encode()) for id, root in keyed if tx.rely_on(Payload, id) is not None)


def merged(earlier: Eviction, later: Eviction) -> Eviction:
    """Return ``later``, including the remaining steps of ``earlier``.

    If a manager is among the nodes, everything is repeated, because it had all keys, even later ones.  For workers,
    only their own steps are repeated.
    """
    if later.was_manager:
        done: tuple[Step, ...] = ()
    else:
        done = tuple(step for step in earlier.done if step not in WORKER_STEPS)
    return replace(
        later,
        was_manager=later.was_manager or earlier.was_manager,
        roots=tuple(dict.fromkeys((*earlier.roots, *later.roots) if later.was_manager else earlier.roots)),
        others=tuple(dict.fromkeys(earlier.nodes)),
        keeping=tuple(dict.fromkeys((*earlier.keeping, *later.keeping))),
        done=done,
        damaged=() if later.was_manager else earlier.damaged,
    )


def _target(tx: Transaction, name: str) -> Node:
    """Return the node, or for a removed one a node with only its id."""
    nodes = list(tx.find(Node))
    for matches in (
        [node for node in nodes if node.id == name],
        [node for node in nodes if node.description.hostname == name],
        [node for node in nodes if node.id.startswith(name)],
    ):
        if len(matches) > 1:
            raise FailedPrecondition(f"node {name} is ambiguous ({len(matches)} matches found)")
        if matches:
            return matches[0]
    revocation = tx.lookup(Revocation, name)
    if revocation is None or not revocation.is_removed:
        raise NotFound(f"node {name} not found")
    return Node(id=NodeId(name))


def _was_manager(tx: Transaction, node: Node) -> bool:
    """Return whether the node may have keys of the managers, because it is a manager, or was one and its certificates
    have not expired.
    """
    revocation = tx.lookup(Revocation, node.id)
    has_been = revocation is not None and bool(revocation.serials)
    issued = node.certificate is not None and bool(node.certificate.serials)
    return has_been or issued or node.spec.role is NodeRole.MANAGER


def _stored(tx: Transaction) -> Eviction | None:
    payload = tx.lookup(Payload, EVICTION_ID)
    return decoded_eviction(payload) if payload is not None else None


def note_done(tx: Transaction, node_id: NodeId, step: Step) -> None:
    """Record that a step is done."""
    present = _stored(tx)
    if present is not None and present.node_id == node_id and step not in present.done:
        roots = present.roots
        if step == "keys":
            # A root that was created after the eviction began was written with keys that the node had.
            known = _known_roots(tx, tx.get(Swarm, cluster_of(tx).id))
            roots = (*roots, *(root for root in known if root not in roots))
        changed = replace(present, done=(*present.done, step), waits_for="", roots=roots)
        tx.put(Payload(id=EVICTION_ID, data=changed.encode()))


def note_damaged(tx: Transaction, node_id: NodeId, keys: tuple[str, ...]) -> None:
    """Record the values that cannot be decrypted."""
    present = _stored(tx)
    if present is not None and present.node_id == node_id and present.damaged != keys:
        tx.put(Payload(id=EVICTION_ID, data=replace(present, damaged=keys).encode()))


def note_waiting(tx: Transaction, node_id: NodeId, reason: str) -> None:
    """Record the reason why the current step waits."""
    present = _stored(tx)
    if present is not None and present.node_id == node_id and present.waits_for != reason:
        tx.put(Payload(id=EVICTION_ID, data=replace(present, waits_for=reason).encode()))


def remove_evicted(
    tx: Transaction, node_ids: Iterable[NodeId], now_ns: int, *, keeping: Collection[NodeId] = ()
) -> str:
    """Demote the nodes, then remove them.  Returns the reason for a wait, or an empty string once they are removed.

    Args:
        keeping: The nodes whose containers keep running.
    """
    waits = [_remove(tx, id, now_ns, keeps_containers=id in keeping) for id in node_ids]
    return "".join(dict.fromkeys(waits))


def _remove(tx: Transaction, node_id: NodeId, now_ns: int, *, keeps_containers: bool) -> str:
    node = tx.lookup(Node, node_id)
    if node is None:
        return ""
    if node.spec.role is NodeRole.MANAGER:
        check_demotion(tx, node)
        tx.put(replace(node, spec=replace(node.spec, role=NodeRole.WORKER)))
    if node.spec.role is NodeRole.MANAGER or is_manager(node) or node.manager_status is not None:
        return "waiting for the managers to remove its vote"
    remove_node(tx, node_id, force=True, now_ns=now_ns, keeps_containers=keeps_containers)
    return ""


def has_new_root(eviction: Eviction, swarm: Swarm) -> bool:
    """Whether the cluster trusts only roots whose keys the node never had."""
    return swarm.rotation is None and root_digest(swarm.tls_info.trust_root.encode()) not in eviction.roots


def is_rotating_root(eviction: Eviction, swarm: Swarm) -> bool:
    """Whether a rotation to such a root is in progress."""
    return swarm.rotation is not None and root_digest(swarm.rotation.root.encode()) not in eviction.roots


def names(nodes: Iterable[Node], most: int = 5) -> str:
    """Return the nodes' names, such as ``w1, w2 and 7 more``."""
    found = sorted(node.description.hostname or str(node.id) for node in nodes)
    more = len(found) - most
    return ", ".join(found[:most]) + (f" and {more} more" if more > 0 else "")


def replace_gossip_keys(tx: Transaction, now: Timestamp, random_bytes: Callable[[int], bytes]) -> None:
    """Replace the keys for docker nodes' gossip and encrypted overlay networks, if there are such nodes."""
    gossip = tx.rely_on(Payload, GOSSIP_KEYS_ID)
    if gossip is not None:
        fresh = rotated(decoded_keys(gossip.data), random_bytes, now)
        tx.put(Payload(id=GOSSIP_KEYS_ID, data=fresh.encode()))


class RootProgress(msgspec.Struct, frozen=True):
    """Reason for a wait, or an empty string if the root is replaced, and an action that must come first."""

    waits_for: str
    action: Action | None = None


def root_progress(
    eviction: Eviction, swarm: Swarm, nodes: Iterable[Node], *, has_root_key: bool
) -> RootProgress:
    """Return how far the root is replaced, and what can be done now."""
    if has_new_root(eviction, swarm):
        return RootProgress("")
    if not is_rotating_root(eviction, swarm):
        if not has_root_key:
            return RootProgress(NO_ROOT_KEY)
        return RootProgress("waiting for nodes to renew their certificates", "rotate")
    waiting = [node for node in nodes if not is_issued_by(node.description.tls_info, swarm.tls_info)]
    if not waiting:
        return RootProgress("the root is being replaced")
    if all(node.status.state is not NodeState.READY for node in waiting):
        # These may be away for days, and the overlay step comes after the root, so replace the keys now.
        return RootProgress(
            f"waiting for nodes that are down to return and renew their certificates: {names(waiting)}",
            "replace gossip keys",
        )
    return RootProgress(f"waiting for nodes to renew their certificates: {names(waiting)}")


def waits_for_restarts(swarm: Swarm, managers: Iterable[Node]) -> str:
    """Return which managers' etcd still trusts the former root, or an empty string if none does."""
    wanted = root_digest(swarm.tls_info.trust_root.encode())
    waiting = [node for node in managers if node.peer_roots != wanted]
    return f"waiting for managers to restart etcd one after another: {names(waiting)}" if waiting else ""
