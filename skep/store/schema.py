"""Defines how each kind of object is stored: its parts and their writers, its claims, references and indexes.

With one writer per part, managers, leader and sessions do not conflict with each other (docs/architecture.md,
"Objects").  The texts of errors are Docker's.

Source: swarmkit, manager/controlapi/{service,network,secret,config}.go (conflicts), api/storeobject.go (names).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from msgspec.structs import replace

from skep.errors import AlreadyExists, PortTaken, SkepError
from skep.model.needs import references_of
from skep.model.network import Network, subnet_of
from skep.model.networks.addresses import is_subnet
from skep.model.networks.data_planes import claimed_underlay, is_overlay, tunnel_key
from skep.model.networks.overlays import vxlan_ids
from skep.model.node import Availability, Node, NodeRole, NodeSpec
from skep.model.options.freezes import CLUSTER, ChangeFreeze
from skep.model.permissions.user import User
from skep.model.quota import StackQuota
from skep.model.secret import Config, Secret
from skep.model.service import PortConfig, PublishMode, Service, UpdateState, UpdateStatus
from skep.model.swarm import Freeze, Swarm
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.stacks import stack_of
from skep.model.values.times import ZERO_TIME, Timestamp
from skep.model.volume import Volume
from skep.store.interface import KindSchema, Object
from skep.store.keys import HEAD, name_claim, port_claim, subnet_claim, vxlan_claim
from skep.store.kinds import JournalChunk, Payload, Revocation, SpecVersion


def is_removed(service: Service) -> bool:
    """Return whether the user has removed the service.  It is hidden and its name and ports are free, but it still owns
    its tasks.
    """
    return service.removed_at is not None


def _tunnel_key(node: Node) -> str | None:
    key = tunnel_key(node)
    return key.key.hex() if key is not None else None


def _published_ports(service: Service) -> Iterator[PortConfig]:
    """Yield the ports with a number, from the spec and from the allocator."""
    wanted = service.spec.endpoint_spec.ports if service.spec.endpoint_spec else ()
    for port in (*wanted, *service.endpoint.ports):
        if port.published_port:
            yield port


def _service_claims(service: Service) -> Iterator[str]:
    if is_removed(service):
        return
    yield name_claim("service", service.spec.name)
    for port in _published_ports(service):
        if port.publish_mode is PublishMode.INGRESS:
            yield port_claim(port.protocol, port.published_port)


def _service_shared_claims(service: Service) -> Iterator[str]:
    if is_removed(service):
        return
    for port in _published_ports(service):
        if port.publish_mode is PublishMode.HOST:
            yield port_claim(port.protocol, port.published_port)


def _service_taken(claim: str, claiming: Service, holder: Service) -> SkepError:
    if claim.startswith("n/"):
        name = claiming.spec.name
        return AlreadyExists(f"name conflicts with an existing object: service {name} already exists")
    mode = "an ingress" if claim in set(_service_claims(holder)) else "a host-published"
    port = claim.rpartition("/")[2]
    return PortTaken(
        f"port '{port}' is already in use by service '{holder.spec.name}' ({holder.id}) as {mode} port",
        stack=stack_of(holder.spec.labels),
        unnamed=f"port '{port}' is already in use by a service of another stack as {mode} port",
    )


def _service_references(service: Service) -> Sequence[tuple[str, str]]:
    return () if is_removed(service) else references_of(service.spec)


def _task_references(task: Task) -> Sequence[tuple[str, str]]:
    """Return the networks of the attachment of a plain container.  Networks of a service's tasks are references of the
    service.
    """
    if task.spec.network_attachment_spec is None:
        return ()
    return [("network", attachment.target) for attachment in task.spec.networks]


def _task_slot(task: Task) -> str:
    """Return ``<service>/<slot>``, or ``<service>/<node>`` for a task of a global service."""
    return f"{task.service_id}/{task.slot or task.node_id}"


def _volume_references(volume: Volume) -> Iterator[tuple[str, str]]:
    """Yield the volume's secrets, which the driver needs until the volume is deleted."""
    yield from (("secret", one.secret) for one in volume.spec.secrets)


def _name_claims(kind: str) -> Callable[[Any], Iterable[str]]:
    return lambda named: (name_claim(kind, named.spec.name),)


def _network_claims(network: Network) -> Iterator[str]:
    """Yield the network's name, and the VXLAN ids and subnets that the leader allocated."""
    yield name_claim("network", network.spec.name)
    if is_overlay(network):
        yield from map(vxlan_claim, vxlan_ids(network.driver_state.options))
        for config in network.ipam_options.configs if network.ipam_options is not None else ():
            if is_subnet(config.subnet):
                yield subnet_claim(str(subnet_of(config)))


def _network_taken(claim: str, claiming: Network, holder: Network) -> SkepError:
    if claim.startswith("n/"):
        return AlreadyExists(f"network {claiming.spec.name} already exists")
    what = "VXLAN id" if claim.startswith("v/") else "subnet"
    given = unquote(claim.partition("/")[2])
    return AlreadyExists(f"{what} {given} belongs to network {holder.spec.name} ({holder.id})")


def _name_taken(kind: str) -> Callable[[str, Any, Any], SkepError]:
    return lambda _, claiming, __: AlreadyExists(f"{kind} {claiming.spec.name} already exists")


def _node_fallback(node: Node, unknown: Collection[str]) -> Node:
    """Let a node without a readable spec keep its tasks but get no new ones.  Its role follows from its other parts."""
    if HEAD not in unknown:
        return node
    certificate = node.certificate
    is_manager = node.manager_status is not None or (
        certificate is not None and certificate.role is NodeRole.MANAGER
    )
    role = NodeRole.MANAGER if is_manager else NodeRole.WORKER
    return replace(node, spec=NodeSpec(availability=Availability.PAUSE, role=role))


UNREAD_STATUS: Final = TaskStatus(state=TaskState.ASSIGNED, message="status cannot be read")
"""Shown for a task on a node if its status was never readable.  No written status is equal to it."""


def _task_fallback(task: Task, unknown: Collection[str]) -> Task:
    """Give a task on a node at least the state ASSIGNED.  The node reports the real state when its next session
    begins.
    """
    if "status" not in unknown or not task.node_id:
        return task
    return replace(task, status=UNREAD_STATUS)


UNREAD_UPDATE: Final = UpdateStatus(state=UpdateState.PAUSED, message="the update's state cannot be read")
"""Shown for a service's update if its status was never readable.  The update pauses, as if a user had paused it."""


def _service_fallback(service: Service, unknown: Collection[str]) -> Service:
    if "update" not in unknown:
        return service
    return replace(service, update_status=UNREAD_UPDATE)


UNREAD_FREEZE: Final = Freeze(since=ZERO_TIME)
"""Shown for a freeze that was never readable.  The part exists only during a freeze.  Time or a user ends it."""


UNREAD_CHANGE_FREEZE: Final = ChangeFreeze(
    until=Timestamp("9999-12-31T00:00:00Z"), reason="the freezes in the store cannot be read"
)
"""Shown for freezes that were never readable, so that nothing happens that a user has held back."""


def _swarm_fallback(swarm: Swarm, unknown: Collection[str]) -> Swarm:
    if "holds" in unknown:
        swarm = replace(swarm, change_freezes={CLUSTER: UNREAD_CHANGE_FREEZE})
    return replace(swarm, freeze=UNREAD_FREEZE) if "freeze" in unknown else swarm


def _nothing_taken(claim: str, claiming: Object, holder: Object) -> SkepError:
    return AlreadyExists(f"{claim} belongs to another object")


def _spec_name(object: Any) -> str:
    name: str = object.spec.name
    return name.lower()


def stack_index(stack: str) -> str:
    """Return the value of ``stack`` in the index "stack", which also has the objects outside of stacks."""
    return stack or _NO_STACK


def _stack(object: Any) -> str:
    return stack_index(stack_of(object.spec.labels))


_NO_STACK: Final = "\0"
"""Indexes have no objects with an empty value, and a stack's name has no such character."""

SCHEMAS: Final[tuple[KindSchema, ...]] = (
    # This comes before tasks, because the merge fills in a task's spec from a version that may be stored in the same
    # revision.
    KindSchema(
        name="spec",
        type=SpecVersion,
        taken=_nothing_taken,
        indexes={"service_id": attrgetter("service_id")},
    ),
    KindSchema(
        name="service",
        type=Service,
        parts={
            "update": ("update_status",),
            "endpoint": ("endpoint",),
            "job": ("job_status",),
        },
        spec_statuses=frozenset({"update", "job"}),
        irreplaceable=frozenset({"update", "job"}),
        claims=_service_claims,
        shared_claims=_service_shared_claims,
        taken=_service_taken,
        references=_service_references,
        indexes={
            "name": lambda service: None if is_removed(service) else _spec_name(service),
            "stack": lambda service: None if is_removed(service) else _stack(service),
        },
        is_hidden=is_removed,
        safe_fallback=_service_fallback,
    ),
    KindSchema(
        name="task",
        type=Task,
        parts={
            "spec": ("spec",),
            "networks": ("networks_attachments",),
            "status": ("status",),
        },
        taken=_nothing_taken,
        references=_task_references,
        indexes={
            "service_id": attrgetter("service_id"),
            "node_id": attrgetter("node_id"),
            "slot": _task_slot,
        },
        safe_fallback=_task_fallback,
    ),
    KindSchema(
        name="node",
        type=Node,
        parts={
            "status": ("description", "status", "silent_since", "silent_together"),
            "load": ("load",),
            "session": ("session",),
            "certificate": ("certificate",),
            "attachments": ("attachments",),
            "paths": ("failing_paths",),
            "judgement": ("cut_off",),
            "manager": ("manager_status", "peer_roots"),
        },
        taken=_nothing_taken,
        indexes={
            "name": lambda node: node.description.hostname.lower(),
            "underlay": claimed_underlay,
            "tunnel_key": _tunnel_key,
        },
        indexed_part="status",
        max_bytes=256 * 1024,
        has_placeholder=True,
        safe_fallback=_node_fallback,
    ),
    KindSchema(
        name="swarm",
        type=Swarm,
        parts={
            "ca": ("join_tokens", "tls_info", "root_rotation_in_progress", "rotation"),
            "freeze": ("freeze",),
            "holds": ("change_freezes", "window", "stack_windows"),
        },
        irreplaceable=frozenset({"ca"}),
        taken=_nothing_taken,
        indexes={"name": _spec_name},
        safe_fallback=_swarm_fallback,
    ),
    KindSchema(
        name="network",
        type=Network,
        parts={"allocation": ("driver_state", "ipam_options")},
        irreplaceable=frozenset({"allocation"}),
        claims=_network_claims,
        taken=_network_taken,
        is_referable=True,
        indexes={"name": _spec_name, "stack": _stack},
    ),
    KindSchema(
        name="secret",
        type=Secret,
        claims=_name_claims("secret"),
        taken=_name_taken("secret"),
        is_referable=True,
        indexes={"name": _spec_name, "stack": _stack},
    ),
    KindSchema(
        name="config",
        type=Config,
        max_bytes=1_400_000,  # Docker's 1000 KiB of data, in base64
        claims=_name_claims("config"),
        taken=_name_taken("config"),
        is_referable=True,
        indexes={"name": _spec_name, "stack": _stack},
    ),
    KindSchema(
        name="volume",
        type=Volume,
        parts={"info": ("is_creating", "info", "message"), "publish": ("publish_status",)},
        irreplaceable=frozenset({"info", "publish"}),
        claims=_name_claims("volume"),
        taken=_name_taken("volume"),
        references=_volume_references,
        indexes={"name": _spec_name},
    ),
    KindSchema(
        name="user",
        type=User,
        claims=_name_claims("user"),
        taken=_name_taken("user"),
        indexes={"name": _spec_name},
    ),
    KindSchema(
        name="quota",
        type=StackQuota,
        claims=_name_claims("quota"),
        taken=_name_taken("quota"),
        indexes={"name": _spec_name},
    ),
    KindSchema(name="payload", type=Payload, taken=_nothing_taken),
    KindSchema(name="revocation", type=Revocation, taken=_nothing_taken),
    KindSchema(name="journal", type=JournalChunk, taken=_nothing_taken),
)

SCHEMA_BY_TYPE: Final = {schema.type: schema for schema in SCHEMAS}


def head_fields(schema: KindSchema) -> tuple[str, ...]:
    """Return the fields of a kind that no other part has.

    ``service_status`` and ``damage`` exist in API responses only.
    """
    elsewhere = {field for fields in schema.parts.values() for field in fields} | {"service_status", "damage"}
    return tuple(field.name for field in msgspec.structs.fields(schema.type) if field.name not in elsewhere)
