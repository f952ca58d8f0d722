"""Operations on nodes.

Source: swarmkit, manager/controlapi/node.go; moby 20.10, daemon/cluster/convert/node.go.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, TypeVar

import msgspec
from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, OutOfSequence, Unavailable
from skep.manager.nodes.revocation import revoke
from skep.model.networks.data_planes import is_docker_node, nat_of
from skep.model.node import Availability, Node, NodeRole, NodeSpec, NodeState
from skep.model.node_reports.rootless import is_rootless_node
from skep.model.options.labels import DRAIN_NOW, check_node_labels
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.volume import Volume
from skep.store.interface import Transaction
from skep.store.keys import HEAD

E = TypeVar("E", bound=Enum)


class NodeUpdateBody(ApiObject):
    """Body of ``POST /nodes/{id}/update``, with unchecked role and availability."""

    __go_name__ = "swarm.NodeSpec"

    name: str = ""
    labels: Mapping[str, str] = always({})
    role: Annotated[str, msgspec.Meta(extra={"go": "swarm.NodeRole"})] = ""
    availability: Annotated[str, msgspec.Meta(extra={"go": "swarm.NodeAvailability"})] = ""


def node_spec(body: NodeUpdateBody) -> NodeSpec:
    """Return the spec in ``body``.  Raises: InvalidArgument: unknown role or availability, with the engine's text."""
    return NodeSpec(
        name=body.name,
        labels=body.labels,
        role=_member(NodeRole, "Role", body.role),
        availability=_member(Availability, "Availability", body.availability),
    )


def _member(cls: type[E], noun: str, word: str) -> E:
    try:
        return cls(word.lower())
    except ValueError:
        raise InvalidArgument(f'invalid {noun}: "{word}"') from None


def update_node(tx: Transaction, id: NodeId, spec: NodeSpec, version: int) -> Node:
    """Replace the spec of a node that is still at ``version``.

    Raises:
        NotFound: The node does not exist.
        OutOfSequence: The node is at another version.
        InvalidArgument: A label cannot be read.
        FailedPrecondition: A node that cannot manage a cluster would become a manager, or the last manager would be
            demoted, or the remaining managers would have no quorum.
    """
    node = tx.get(Node, id)
    check_node_labels(spec.labels)
    is_promoted = spec.role is NodeRole.MANAGER and node.spec.role is not spec.role
    if is_promoted and (obstacle := _obstacle_to_managing(node)):
        raise FailedPrecondition(f"node {node.description.hostname or id} {obstacle}")
    if node.spec.role is NodeRole.MANAGER and spec.role is NodeRole.WORKER:
        check_demotion(tx, node)
    if node.version != Version(index=version):
        raise OutOfSequence
    if spec.availability is not Availability.DRAIN and DRAIN_NOW in spec.labels:
        # Otherwise a later drain would stop tasks at once, without anybody's request.
        spec = replace(spec, labels={name: spec.labels[name] for name in spec.labels if name != DRAIN_NOW})
    return tx.put(replace(node, spec=spec))


def _obstacle_to_managing(node: Node) -> str:
    """Return why a node cannot manage a cluster, with the next step, or an empty text."""
    if is_docker_node(node):
        return (
            "is a Docker Engine and cannot manage this cluster: promote a Skep node, or join one with the manager "
            "token"
        )
    if nat := nat_of(node):
        return (
            f"is behind NAT ({nat}) and cannot manage a cluster, because other nodes do not reach it: promote another "
            'node, or set behind-nat = "no" on this one if that is wrong'
        )
    if is_rootless_node(node):
        return (
            "is rootless and cannot manage a cluster, because other nodes do not reach it: promote a node that runs as "
            "root"
        )
    return ""


def remove_node(
    tx: Transaction, id: NodeId, *, force: bool, now_ns: int, keeps_containers: bool = False
) -> None:
    """Delete a node and revoke its certificates.

    The leader then marks its tasks as orphaned, because nobody can report their status any longer, and replaces them.
    The node stops its containers as soon as a manager refuses its certificate, unless ``keeps_containers``.

    Raises:
        NotFound: The node does not exist.
        FailedPrecondition: The node is a manager.  Or ``force`` is False, and the node is up or went down together with
            most others.
        Unavailable: This manager cannot read whether the node is a manager.
    """
    node = tx.get(Node, id)
    if "manager" in tx.damaged(Node).get(id, ()):
        raise Unavailable(
            f"this manager cannot read whether node {id} is a manager with a vote: try another manager"
        )
    if node.spec.role is NodeRole.MANAGER and node.manager_status is not None and _has_vote(node):
        raise FailedPrecondition(
            f"node {id} is a cluster manager and is a member of the raft cluster. "
            "It must be demoted to worker before removal"
        )
    if not force and node.status.state is NodeState.READY:
        raise FailedPrecondition(f"node {id} is not down and can't be removed")
    if not force:
        _check_disruption(tx, node)
    revoke(tx, node, now_ns, is_removed=True, keeps_containers=keeps_containers)
    tx.delete(Node, id)


def _check_disruption(tx: Transaction, node: Node) -> None:
    """Check that the node did not go down together with most nodes, or since then, if containers may still run there.

    The managers' network may have failed instead of the nodes.  Then a removal would run containers twice, and take
    volumes from containers that still write.
    """
    freezes = [found.freeze for one in tx.find(Swarm) if (found := tx.rely_on(Swarm, one.id, "freeze"))]
    freeze = next((one for one in freezes if one is not None), None)
    if freeze is None or not freeze.includes(node.id, node.silent_since):
        return
    may_run = any(not task.status.state.is_terminal for task in tx.find(Task, node_id=node.id))
    if may_run or any(volume.status_on(node.id) is not None for volume in tx.find(Volume)):
        others = f"{len(freeze.nodes)} of {freeze.ready_before} nodes"
        when = f"at once with {others}" if node.id in freeze.nodes else f"while {others} are down"
        raise FailedPrecondition(
            f"node {node.id} went down {when}, so it may be "
            "cut off while its containers run: wait until nodes return, run `skep cluster resume`, or use --force"
        )


def check_demotion(tx: Transaction, node: Node) -> None:
    """Check that a manager may be demoted.

    A manager that a restore or a forced new cluster has left behind has no vote, so it may always be demoted.

    Raises:
        FailedPrecondition: It is the last manager, or the remaining managers would have no quorum.
    """
    if not _has_vote(node):
        return
    managers = [other for other in tx.find(Node) if other.spec.role is NodeRole.MANAGER and _has_vote(other)]
    if len(managers) == 1:
        raise FailedPrecondition("attempting to demote the last manager of the swarm")
    for other in managers:
        tx.rely_on(
            Node, other.id, HEAD, "manager"
        )  # without this, two managers could demote each other at the same moment
    staying = [other for other in managers if other.id != node.id]
    reachable = [other for other in staying if other.is_reachable_manager]
    if len(reachable) <= len(staying) // 2:
        raise FailedPrecondition("can't remove member from the raft: this would result in a loss of quorum")


def _has_vote(node: Node) -> bool:
    return node.manager_status is None or node.manager_status.has_vote
