"""The supposed changes: nodes that are lost or drained, and new specs of services.

Each is written to the copy by the function that writes the real one.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from skep.api.formats.service_form import settled
from skep.errors import InvalidArgument, NotFound
from skep.manager.control.nodes import update_node
from skep.manager.control.services import create_service, update_service
from skep.manager.dispatcher.node_sessions.registration import SilentNode, mark_down
from skep.manager.membership.roles import quorum
from skep.manager.nodes.heartbeats import configured_grace_s
from skep.manager.what_if.rehearsal import Rehearsal
from skep.model.container import ConfigReference, SecretReference
from skep.model.door.routes import tls_secrets
from skep.model.network import Network, NetworkSpec
from skep.model.node import Availability, Node, NodeState
from skep.model.options.constraints import label_reader
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import NetworkAttachmentConfig, Service, ServiceSpec
from skep.model.values.ids import ConfigId, IdSource, NetworkId, NodeId, SecretId
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import Transaction, View


def nodes_named(view: View, word: str) -> tuple[NodeId, ...]:
    """Return the node called ``word``, or with ``LABEL=VALUE`` all nodes with this label.

    Raises: NotFound: There is no such node; InvalidArgument: The name is ambiguous.
    """
    name, sign, value = word.partition("=")
    if not sign:
        return (view.resolve(Node, word).id,)
    if not name:
        raise InvalidArgument(f"{word}: write a node's name, or LABEL=VALUE")
    found = tuple(node.id for node in view.find(Node) if label_of(node, name) == value)
    if not found:
        raise NotFound(f"no node has the label {word}")
    return found


def label_of(node: Node, name: str) -> str | None:
    """Return the value of a label: of the node's spec, or else of its engine.  ``name`` may have its prefix."""
    if (read := label_reader(name)) is not None:
        return read(node)
    return node.spec.labels.get(name, node.description.engine.labels.get(name))


def lose(rehearsal: Rehearsal, nodes: Sequence[NodeId]) -> None:
    """Mark the nodes down, after the time in which their managers notice that."""
    view = rehearsal.copy.view()
    grace_s = configured_grace_s(view)
    rehearsal.clock.advance(grace_s)
    for id in nodes:
        node = view.get(Node, id)
        if node.session is None or node.status.state is NodeState.DOWN:
            continue  # nobody waits for its heartbeats
        silent = SilentNode(
            node_id=id,
            session_id=node.session.session_id,
            silent_s=grace_s,
            with_others=len(nodes) > 1,
        )
        rehearsal.copy.apply(mark_down, silent, rehearsal.clock.now_ns())


def drain(rehearsal: Rehearsal, nodes: Sequence[NodeId]) -> None:
    """Drain the nodes.  Raises: FailedPrecondition; InvalidArgument: As for the real update."""
    for id in nodes:
        node = rehearsal.copy.view().get(Node, id)
        spec = replace(node.spec, availability=Availability.DRAIN)
        rehearsal.copy.apply(update_node, id, spec, node.version.index)


def deploy(rehearsal: Rehearsal, spec: ServiceSpec) -> None:
    """Create the service of ``spec``, or update the present one.  Networks and files that do not exist are supposed.

    Raises: SkepError: The managers would refuse the spec.
    """
    rehearsal.copy.apply(_write_service, spec, rehearsal.new_id, timestamp(rehearsal.clock.now_ns()))


def _write_service(tx: Transaction, spec: ServiceSpec, new_id: IdSource, now: Timestamp) -> None:
    spec = settled(_with_references(tx, spec, new_id))
    present = tx.find(Service, name=spec.name)
    if present:
        update_service(tx, present[0].id, spec, present[0].version.index, now=now)
    else:
        create_service(tx, spec, new_id=new_id, new_name=lambda: spec.name, now=now)


def _with_references(tx: Transaction, spec: ServiceSpec, new_id: IdSource) -> ServiceSpec:
    """Return ``spec`` with the ids of its networks, secrets and configs, and create the missing ones."""

    def network(one: NetworkAttachmentConfig) -> NetworkAttachmentConfig:
        known = tx.lookup(Network, one.target) or next(iter(tx.find(Network, name=one.target)), None)
        if known is None:
            overlay = NetworkSpec(name=one.target, driver_configuration=Driver(name="overlay"))
            known = tx.put(Network(id=NetworkId(new_id()), spec=overlay))
        return replace(one, target=known.id)

    def secret(one: SecretReference) -> SecretReference:
        known = next(iter(tx.find(Secret, name=one.secret_name)), None)
        known = known or tx.put(Secret(id=SecretId(new_id()), spec=SecretSpec(name=one.secret_name)))
        return replace(one, secret_id=known.id)

    def config(one: ConfigReference) -> ConfigReference:
        known = next(iter(tx.find(Config, name=one.config_name)), None)
        known = known or tx.put(Config(id=ConfigId(new_id()), spec=ConfigSpec(name=one.config_name)))
        return replace(one, config_id=known.id)

    for name in sorted(tls_secrets(spec.labels)):
        secret(SecretReference(secret_name=name))
    template = spec.task_template
    container = template.container_spec
    if container is not None:
        container = replace(
            container,
            secrets=tuple(map(secret, container.secrets)),
            configs=tuple(map(config, container.configs)),
        )
    networks = tuple(map(network, template.networks))
    return replace(spec, task_template=replace(template, container_spec=container, networks=networks))


def quorum_after(view: View, lost: Sequence[NodeId]) -> tuple[int, int]:
    """Return how many reachable managers with a vote are left, and how many a quorum needs.  0 needed: no managers."""
    voting = [
        node for node in view.find(Node) if node.manager_status is not None and node.manager_status.has_vote
    ]
    left = [node for node in voting if node.is_reachable_manager and node.id not in lost]
    return len(left), quorum(len(voting)) if voting else 0
