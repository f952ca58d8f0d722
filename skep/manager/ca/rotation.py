"""The next step of a root rotation.  Pure.

Every node is requested to renew its certificate, a bounded number of nodes at a time.  The rotation is over once every
node has reported a certificate of the new root.  An unavailable node delays the end until it returns or is removed,
because otherwise it would be locked out.

Source: swarmkit, ca/reconciler.go.
"""

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from skep.manager.cluster import cluster_of
from skep.model.node import Node, NodeState
from skep.model.swarm import JoinTokens, Swarm
from skep.model.values.ids import IdSource, NodeId
from skep.security.tokens import join_token
from skep.security.trust import is_issued_by, tls_info
from skep.store.interface import Transaction, View
from skep.store.kinds import NEXT_ROOT_KEY_ID, ROOT_KEY_ID, Payload

REQUESTED_MAX = 30
"""Largest number of nodes with a pending renewal request, as in SwarmKit."""

RENEWAL_S = 30.0
"""Seconds after which a request that was not fulfilled no longer counts as pending, and is repeated."""

_NAMED_MAX = 5
"""Unavailable nodes that a warning names, so that it stays readable."""
ROTATE = "rotate"
"""``NodeCertificate.state`` of a node that is requested to renew."""


class RequestRenewals(msgspec.Struct, frozen=True, kw_only=True):
    """Request these nodes to renew their certificates."""

    node_ids: tuple[NodeId, ...]


class Renewal(msgspec.Struct, frozen=True):
    """One node that is requested to renew."""

    node_id: NodeId


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """Announce the new root."""

    root: str


def next_step(
    swarm: Swarm, nodes: Iterable[Node], requested_at: Mapping[NodeId, float], now: float
) -> RequestRenewals | Finish | None:
    """Return the next step of a rotation, or None without a rotation or if it has to wait for nodes.

    Args:
        requested_at: Time of each node's last request.  Like ``now``, in the leader's monotonic seconds.
    """
    rotation = swarm.rotation
    if rotation is None:
        return None
    waiting = _waiting(swarm, nodes)
    if not waiting:
        return Finish(root=rotation.root)
    ready = [node for node in waiting if node.status.state is NodeState.READY]
    # A request may change nothing, because the node was made before it had a certificate, or because it is removed.
    recent = {node.id for node in waiting if now - requested_at.get(node.id, now - RENEWAL_S) < RENEWAL_S}
    busy = sum(node.id in recent for node in ready)
    due = [node for node in ready if node.id not in recent]
    away = [
        node
        for node in waiting
        if node.status.state is not NodeState.READY and node.id not in recent and not _is_requested(node)
    ]
    chosen = (*due[: max(0, REQUESTED_MAX - busy)], *away[:REQUESTED_MAX])
    return RequestRenewals(node_ids=tuple(sorted(node.id for node in chosen))) if chosen else None


def _waiting(swarm: Swarm, nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes that have not reported a certificate of the new root."""
    return [node for node in nodes if not is_issued_by(node.description.tls_info, swarm.tls_info)]


def rotation_warnings(view: View) -> Iterator[str]:
    """Yield a warning about a rotation that unavailable nodes delay."""
    for swarm in view.find(Swarm):
        waiting = _waiting(swarm, view.find(Node)) if swarm.rotation is not None else []
        away = sorted(node.shown_name for node in waiting if node.status.state is not NodeState.READY)
        if away:
            more = f" and {len(away) - _NAMED_MAX} more" if len(away) > _NAMED_MAX else ""
            yield (
                "WARNING: the rotation of the cluster's root certificate waits for nodes that do not respond: "
                f"{', '.join(away[:_NAMED_MAX])}{more}. Start them, or remove them with docker node rm --force"
            )


def _is_requested(node: Node) -> bool:
    return node.certificate is not None and node.certificate.state == ROTATE


def request_renewal(tx: Transaction, renewal: Renewal) -> None:
    """Request a renewal.  The manager with the node's session sends it, now or when the node returns."""
    node = tx.lookup(Node, renewal.node_id)
    if node is not None and node.certificate is not None and not _is_requested(node):
        certificate = msgspec.structs.replace(node.certificate, state=ROTATE)
        tx.put(msgspec.structs.replace(node, certificate=certificate))


def finish(tx: Transaction, root: str, new_id: IdSource) -> bool:
    """Make the new root the only one: write the trusted root, the signing key, and new tokens.

    Returns False if another rotation has started.
    """
    swarm = tx.get(Swarm, cluster_of(tx).id)
    if swarm.rotation is None or swarm.rotation.root != root:
        return False
    root_pem = root.encode()
    if (key := tx.rely_on(Payload, NEXT_ROOT_KEY_ID)) is not None:
        tx.put(Payload(id=ROOT_KEY_ID, data=key.data))
        tx.delete(Payload, NEXT_ROOT_KEY_ID)
    elif tx.lookup(Payload, ROOT_KEY_ID) is not None:
        tx.delete(Payload, ROOT_KEY_ID)  # an external authority has the key of the new root
    tx.put(
        msgspec.structs.replace(
            swarm,
            tls_info=tls_info(root_pem),
            join_tokens=JoinTokens(
                worker=join_token(root_pem, new_id()), manager=join_token(root_pem, new_id())
            ),
            rotation=None,
            root_rotation_in_progress=False,
        )
    )
    return True
