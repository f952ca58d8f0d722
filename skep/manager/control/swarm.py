"""Operations on the cluster as a whole.

Founding the cluster is one transaction.  ``api.formats.swarm_requests`` checks the requests that lead to it.

Source: swarmkit, manager/controlapi/cluster.go; moby 20.10, daemon/cluster/swarm.go.
"""

from collections.abc import Callable, Iterable
from datetime import datetime

import msgspec
from msgspec.structs import replace

from skep.api.formats.swarm_requests import check_swarm_name, merged_spec
from skep.errors import FailedPrecondition, InvalidArgument, OutOfSequence, Unavailable
from skep.manager.cluster import cluster_of, etcds_behind, has_etcd_behind, is_node_behind
from skep.manager.control.networks import first_networks
from skep.model.node import Node, NodeState
from skep.model.options.labels import check_swarm_labels
from skep.model.swarm import (
    FROZEN,
    RENEW_WINDOW_LABEL,
    CAConfig,
    Freeze,
    JoinTokens,
    RootRotation,
    Swarm,
    SwarmSpec,
)
from skep.model.values.ids import IdSource
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, duration_ns
from skep.security.authority import Authority
from skep.security.external import check_external_authorities
from skep.security.locking import new_unlock_key
from skep.security.rotation import NextRoot, PreparedRoots, Roots, is_about_roots, requested_roots
from skep.security.tokens import join_token
from skep.security.trust import tls_info
from skep.store.interface import Transaction, View
from skep.store.kinds import NEXT_ROOT_KEY_ID, ROOT_KEY_ID, UNLOCK_KEY_ID, Payload

CERT_EXPIRY_MIN_NS = 3600 * SECOND_NS
"""Shortest lifetime of node certificates, as in SwarmKit."""

NAMED_MAX = 5
"""Largest number of nodes that an error names."""


class Rotations(msgspec.Struct, frozen=True, kw_only=True):
    """Secrets that an update of the cluster replaces."""

    worker_token: bool = False
    manager_token: bool = False
    unlock_key: bool = False


def found_swarm(
    tx: Transaction, swarm: Swarm, first_node: Node, new_id: IdSource, *, has_ipv6: bool = False
) -> Swarm:
    """Write the initial objects of a new cluster: itself, its first node, ingress and the predefined networks.

    Args:
        has_ipv6: Whether its first manager is advertised by an IPv6 address.

    Raises:
        FailedPrecondition: The store already has a cluster.
        InvalidArgument: The spec cannot work.
    """
    if tx.find(Swarm):
        raise FailedPrecondition("the store already has a cluster")
    check_swarm_spec(swarm.spec)
    tx.put(replace(first_node, created_at=swarm.created_at))
    for network in first_networks(new_id=new_id, now=swarm.created_at, has_ipv6=has_ipv6):
        tx.put(network)
    _keep_unlock_key(tx, is_wanted=swarm.spec.encryption_config.auto_lock_managers, new_key=new_unlock_key)
    return tx.put(swarm)


def update_swarm(
    tx: Transaction,
    spec: SwarmSpec,
    version: int,
    rotations: Rotations,
    *,
    new_id: IdSource,
    now: datetime,
    new_root: Callable[[], Authority] = Authority.create,
    new_key: Callable[[], bytes] = new_unlock_key,
    prepared: PreparedRoots = PreparedRoots(),  # noqa: B008 -- immutable
) -> Swarm:
    """Replace the cluster's settings if it is still at ``version``, and the tokens that ``rotations`` names.

    A root in the settings, or a raised rotation counter, starts a rotation of the root, which ``manager.ca`` completes.

    Args:
        prepared: Results of external authorities for it (``manager.ca.external``).

    Raises:
        InvalidArgument: The spec cannot work.
        OutOfSequence: The cluster is at another version.
        FailedPrecondition: The root would be rotated while an unavailable node trusts an older root than the current
            one.
        Unavailable: A ready node or a manager's etcd still trusts an older root, which changes soon
            (``is_last_rotation_known``).
    """
    swarm = tx.get(Swarm, cluster_of(tx).id)
    check_swarm_name(spec)
    ca_config = spec.ca_config  # includes the root's key, which the merged settings do not have
    spec = merged_spec(spec)
    check_swarm_spec(spec)
    rooted = _with_root(tx, swarm, ca_config, now, new_root, prepared)
    if swarm.version != Version(index=version):
        raise OutOfSequence
    if rooted.rotation is not None and rooted.rotation != swarm.rotation:
        _check_rotation(tx, swarm)
    tokens = _rotated(swarm, rotations, new_id)
    is_locked = spec.encryption_config.auto_lock_managers
    _keep_unlock_key(tx, is_wanted=is_locked, is_rotated=rotations.unlock_key, new_key=new_key)
    return tx.put(replace(rooted, spec=spec, join_tokens=tokens))


def _check_rotation(tx: Transaction, swarm: Swarm) -> None:
    """Check that no node would be lost by another rotation.  Raises: FailedPrecondition, Unavailable."""
    _check_all_can_return(tx, swarm)
    _check_nodes(tx, swarm)
    _check_etcds(tx)


def _check_all_can_return(tx: Transaction, swarm: Swarm) -> None:
    """Check that no unavailable node or etcd has missed the end of the last rotation.

    Such a node accepts the managers only because the previous root has cross-signed the current one.  In another
    rotation, the managers would send a different intermediate certificate.  SwarmKit does not check this, and loses the
    node.

    Raises:
        FailedPrecondition: Such a node exists.
    """
    behind = [
        node
        for node in tx.find(Node)
        if node.status.state is not NodeState.READY
        and (is_node_behind(node, swarm) or has_etcd_behind(node, swarm))
    ]
    if behind:
        raise FailedPrecondition(
            f"unavailable nodes still trust the root before the current one, and could not return after another "
            f"rotation: {_names(behind)}. Start them, or remove them (docker node rm --force)"
        )


def _check_nodes(tx: Transaction, swarm: Swarm) -> None:
    """Check that every ready node has reported the present root.  Raises: Unavailable.

    A node that has not may already be disconnected, because it stays ready until its grace period is over.
    """
    if behind := [node for node in tx.find(Node) if is_node_behind(node, swarm)]:
        raise Unavailable(
            f"nodes have not yet taken the root of the last rotation, try again: {_names(behind)} "
            "(a node that does not take it has to be restarted or removed)"
        )


def _check_etcds(tx: Transaction) -> None:
    """Check that every etcd trusts the current root.  Raises: Unavailable."""
    if behind := etcds_behind(tx):
        raise Unavailable(
            f"managers are restarting etcd after the last rotation of the root, try again: {_names(behind)}"
        )


def _names(nodes: Iterable[Node]) -> str:
    """Return the names of the first of ``nodes``."""
    return ", ".join(sorted(node.shown_name for node in nodes)[:NAMED_MAX])


def rotate_root(tx: Transaction, now: datetime, new_root: Callable[[], Authority] = Authority.create) -> None:
    """Start a rotation to a new root, as ``docker swarm ca --rotate`` does.

    Raises: FailedPrecondition, Unavailable (``update_swarm``).
    """
    swarm = tx.get(Swarm, cluster_of(tx).id)
    _check_rotation(tx, swarm)
    present = swarm.spec.ca_config
    ca_config = replace(present, force_rotate=present.force_rotate + 1)
    rooted = _with_root(tx, swarm, ca_config, now, new_root, PreparedRoots())
    tx.put(replace(rooted, spec=replace(swarm.spec, ca_config=ca_config)))


def rotate_join_tokens(tx: Transaction, new_id: IdSource) -> None:
    """Replace both tokens."""
    swarm = tx.get(Swarm, cluster_of(tx).id)
    rotations = Rotations(worker_token=True, manager_token=True)
    tx.put(replace(swarm, join_tokens=_rotated(swarm, rotations, new_id)))


def rotate_unlock_key(tx: Transaction, new_key: Callable[[], bytes] = new_unlock_key) -> None:
    """Replace the unlock key, if managers are locked."""
    is_locked = tx.get(Swarm, cluster_of(tx).id).spec.encryption_config.auto_lock_managers
    _keep_unlock_key(tx, is_wanted=is_locked, is_rotated=True, new_key=new_key)


def resume_replacement(tx: Transaction) -> None:
    """End the freeze of replacement.  Raises: FailedPrecondition: replacement is not suspended."""
    swarm = tx.get(Swarm, cluster_of(tx).id)
    if swarm.freeze is None:
        raise FailedPrecondition("replacement is not suspended, so there is nothing to resume")
    tx.put(replace(swarm, freeze=None))


def frozen_message(freeze: Freeze) -> str:
    """Return why no tasks are replaced, for users."""
    return (
        f"{FROZEN} since {freeze.since[:10]} {freeze.since[11:19]} UTC: {freeze.cause}; "
        "it resumes when half of them are back, after 10 minutes, or with: skep cluster resume"
    )


def check_swarm_spec(spec: SwarmSpec) -> None:
    """Refuse settings that cannot work.  Raises: InvalidArgument."""
    if spec.ca_config.node_cert_expiry < CERT_EXPIRY_MIN_NS:
        raise InvalidArgument("minimum certificate expiry time is: 1h0m0s")
    window = spec.labels.get(RENEW_WINDOW_LABEL)
    if window is not None and (duration_ns(window) is None or window.startswith("-")):
        raise InvalidArgument(f"{RENEW_WINDOW_LABEL} is not a duration: {window!r}: write it like 720h, or 0")
    if spec.dispatcher.heartbeat_period < 0:
        raise InvalidArgument("heartbeat time period cannot be a negative duration")
    check_swarm_labels(spec.labels)
    check_external_authorities(spec.ca_config)


def unlock_key_of(view: View) -> bytes | None:
    """Return the key that opens locked managers, or None if they are not locked."""
    payload = view.lookup(Payload, UNLOCK_KEY_ID)
    return payload.data if payload is not None else None


def _keep_unlock_key(
    tx: Transaction, *, is_wanted: bool, is_rotated: bool = False, new_key: Callable[[], bytes]
) -> None:
    """Keep an unlock key as long as autolock is on.  As in SwarmKit, an old key is never restored."""
    is_there = tx.rely_on(Payload, UNLOCK_KEY_ID) is not None
    if is_wanted and (is_rotated or not is_there):
        tx.put(Payload(id=UNLOCK_KEY_ID, data=new_key()))
    elif is_there and not is_wanted:
        tx.delete(Payload, UNLOCK_KEY_ID)


def _with_root(
    tx: Transaction,
    swarm: Swarm,
    ca_config: CAConfig,
    now: datetime,
    new_root: Callable[[], Authority],
    prepared: PreparedRoots,
) -> Swarm:
    """Return ``swarm`` with the root that ``ca_config`` requests, or with a rotation to it.

    Raises:
        InvalidArgument: The requested root is invalid.
        Unavailable: The roots have changed since ``prepared``.
    """
    if not is_about_roots(swarm.spec.ca_config, ca_config):
        return swarm
    is_forced = ca_config.force_rotate != swarm.spec.ca_config.force_rotate
    roots = roots_of(tx, swarm)
    requested = requested_roots(
        roots, ca_config, is_forced=is_forced, now=now, create=new_root, prepared=prepared
    )
    return _towards(tx, swarm, requested) if requested != roots else swarm


def roots_of(view: View, swarm: Swarm) -> Roots:
    """Return the cluster's root and the next root during a rotation, with the keys that are in the store."""
    rotation = swarm.rotation
    return Roots(
        root_pem=swarm.tls_info.trust_root.encode(),
        key_pem=_key(view, ROOT_KEY_ID),
        next=NextRoot(
            root_pem=rotation.root.encode(),
            key_pem=_key(view, NEXT_ROOT_KEY_ID),
            cross_signed_pem=rotation.cross_signed.encode(),
        )
        if rotation is not None
        else None,
    )


def _towards(tx: Transaction, swarm: Swarm, requested: Roots) -> Swarm:
    """Return ``swarm`` with other roots and, if they have a next one, a rotation to it.  Writes the keys of both."""
    _keep_key(tx, ROOT_KEY_ID, requested.key_pem)
    _keep_key(tx, NEXT_ROOT_KEY_ID, requested.next.key_pem if requested.next is not None else b"")
    if requested.next is None:
        info = tls_info(requested.root_pem)
        return replace(swarm, tls_info=info, rotation=None, root_rotation_in_progress=False)
    return replace(
        swarm,
        tls_info=tls_info(requested.root_pem, requested.next.root_pem),
        rotation=RootRotation(
            root=requested.next.root_pem.decode("ascii"),
            cross_signed=requested.next.cross_signed_pem.decode("ascii"),
        ),
        root_rotation_in_progress=True,
    )


def _key(view: View, id: str) -> bytes:
    payload = view.lookup(Payload, id)
    return payload.data if payload is not None else b""


def _keep_key(tx: Transaction, id: str, key_pem: bytes) -> None:
    """Store this key, or delete it if it is empty because an external authority has it."""
    if key_pem:
        tx.put(Payload(id=id, data=key_pem))
    elif tx.lookup(Payload, id) is not None:
        tx.delete(Payload, id)


def _rotated(swarm: Swarm, rotations: Rotations, new_id: IdSource) -> JoinTokens:
    root = swarm.tls_info.trust_root.encode()
    tokens = swarm.join_tokens
    return JoinTokens(
        worker=join_token(root, new_id()) if rotations.worker_token else tokens.worker,
        manager=join_token(root, new_id()) if rotations.manager_token else tokens.manager,
    )
