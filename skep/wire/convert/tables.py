"""Tables of networks: split into pieces by the manager, and joined by the node."""

from collections.abc import Iterable, Iterator, Sequence

from skep.errors import InvalidArgument
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import (
    NetworkHead,
    Segment,
    TableChange,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
    TableSet,
    TableSplit,
)
from skep.model.networks.wireguard import PublicKey
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.wire import skep_pb2 as pb

PIECE_BYTES = 128 * 1024
"""Bytes of one piece of a change, which takes about 5 ms to encode.  A message has several pieces."""


def pieces_of(change: TableChange) -> Iterator[pb.NetworkChange]:
    """Split ``change`` into one or more pieces of about ``PIECE_BYTES``.  Only the first may be ``is_whole``.

    Revisions belong to the message that contains the pieces.
    """
    piece = pb.NetworkChange(head=_head_to_pb(change.head), whole=change.is_whole)
    piece.removed_nodes.extend(change.removed_nodes)
    piece.removed_endpoints.extend(change.removed_endpoints)
    piece.removed_services.extend(change.removed_services)
    piece.unread_services.extend(change.unread)
    size = piece.ByteSize()
    for entry in _entries_to_pb(change):
        if size >= PIECE_BYTES:
            yield piece
            piece, size = pb.NetworkChange(head=_head_to_pb(change.head)), 0
        size += entry.ByteSize()
        match entry:
            case pb.NetworkNode():
                piece.nodes.append(entry)
            case pb.NetworkEndpoint():
                piece.endpoints.append(entry)
            case pb.NetworkService():
                piece.services.append(entry)
    yield piece


def messages_of(
    changes: Iterable[pb.NetworkChange],
    *,
    incarnation: int,
    revision: int,
    is_complete: bool,
    removed: Sequence[NetworkId] = (),
    message_bytes: int = 8 * PIECE_BYTES,
) -> Iterator[pb.NetworkTables]:
    """Yield the one or more messages of a set, each of about ``message_bytes`` at most."""

    def message() -> pb.NetworkTables:
        return pb.NetworkTables(incarnation=incarnation, revision=revision, complete=is_complete)

    current = message()
    current.removed.extend(removed)
    size = current.ByteSize()
    for change in changes:
        change_size = change.ByteSize()
        if current.changes and size + change_size > message_bytes:
            current.more = True
            yield current
            current, size = message(), 0
        current.changes.append(change)
        size += change_size
    yield current


def table_set_from_pb(messages: Sequence[pb.NetworkTables]) -> TableSet:
    """Join the ``messages`` of one set, in their order.

    Several changes in a row may belong to the same network.

    Raises:
        InvalidArgument: The messages belong to different sets, or a change has no network.
    """
    first = messages[0]
    if any((one.incarnation, one.revision) != (first.incarnation, first.revision) for one in messages):
        raise InvalidArgument("pieces of different sets of tables")
    return TableSet(
        revision=first.revision,
        is_complete=first.complete,
        changes=tuple(_change_from_pb(one, first.revision) for piece in messages for one in piece.changes),
        removed=tuple(NetworkId(id) for piece in messages for id in piece.removed),
    )


def _entries_to_pb(change: TableChange) -> Iterator[pb.NetworkNode | pb.NetworkEndpoint | pb.NetworkService]:
    for node in change.nodes:
        yield pb.NetworkNode(
            id=node.id,
            underlay=node.underlay,
            addresses=node.addresses,
            wireguard_keys=[
                pb.NetworkNode.WireGuardKey(key=one.key, port=one.port) for one in node.wireguard_keys
            ],
            site=node.site,
        )
    for service in change.services:
        yield pb.NetworkService(
            id=service.id,
            name=service.name,
            aliases=service.aliases,
            virtual_ips=service.virtual_ips,
            ports=[
                pb.NetworkService.Port(
                    protocol=port.protocol,
                    published=port.published,
                    target=port.target,
                    host_ip=port.options.host_ip,
                    sticky=port.options.is_sticky,
                    prefers_local=port.options.prefers_local,
                    proxy_protocol=port.options.proxy_protocol,
                )
                for port in service.ports
            ],
            labels=service.labels,
            created_at=service.created_at,
            split=_split_to_pb(service.split),
            near=service.is_near,
        )
    for endpoint in change.endpoints:
        yield pb.NetworkEndpoint(
            task_id=endpoint.task_id,
            node_id=endpoint.node_id,
            service_id=endpoint.service_id,
            slot=endpoint.slot,
            name=endpoint.name,
            aliases=endpoint.aliases,
            addresses=endpoint.addresses,
            running=endpoint.is_running,
            serving=endpoint.is_serving,
            named_early=endpoint.is_named_early,
            version=endpoint.version,
        )


def _split_to_pb(split: TableSplit | None) -> pb.NetworkService.Split | None:
    if split is None:
        return None
    return pb.NetworkService.Split(percent=split.percent, versions=split.versions, withdrawn=split.withdrawn)


def _head_to_pb(head: NetworkHead) -> pb.NetworkHead:
    return pb.NetworkHead(
        id=head.id,
        name=head.name,
        segments=[
            pb.NetworkHead.Segment(subnet=one.subnet, gateway=one.gateway, vni=one.vni)
            for one in head.segments
        ],
        mtu=head.mtu,
        port=head.port,
        ingress=head.is_ingress,
        internal=head.is_internal,
        encrypted=head.is_encrypted,
        door=head.is_door,
    )


def _change_from_pb(change: pb.NetworkChange, revision: int) -> TableChange:
    return TableChange(
        head=_head_from_pb(change.head),
        revision=revision,
        is_whole=change.whole,
        nodes=tuple(map(_node_from_pb, change.nodes)),
        removed_nodes=tuple(map(NodeId, change.removed_nodes)),
        endpoints=tuple(map(_endpoint_from_pb, change.endpoints)),
        removed_endpoints=tuple(map(TaskId, change.removed_endpoints)),
        services=tuple(map(_service_from_pb, change.services)),
        removed_services=tuple(map(ServiceId, change.removed_services)),
        unread=tuple(map(ServiceId, change.unread_services)),
    )


def _head_from_pb(head: pb.NetworkHead) -> NetworkHead:
    # The id is used in file names on the node.
    if not (head.id.isascii() and head.id.isalnum()):
        raise InvalidArgument(f"{head.id!r} is no network's id")
    return NetworkHead(
        id=NetworkId(head.id),
        name=head.name,
        segments=tuple(Segment(subnet=one.subnet, gateway=one.gateway, vni=one.vni) for one in head.segments),
        mtu=head.mtu,
        port=head.port,
        is_ingress=head.ingress,
        is_internal=head.internal,
        is_encrypted=head.encrypted,
        is_door=head.door,
    )


def _node_from_pb(node: pb.NetworkNode) -> TableNode:
    return TableNode(
        id=NodeId(node.id),
        underlay=node.underlay,
        addresses=tuple(node.addresses),
        wireguard_keys=tuple(PublicKey(one.key, one.port) for one in node.wireguard_keys),
        site=node.site,
    )


def _endpoint_from_pb(endpoint: pb.NetworkEndpoint) -> TableEndpoint:
    return TableEndpoint(
        task_id=TaskId(endpoint.task_id),
        node_id=NodeId(endpoint.node_id),
        service_id=ServiceId(endpoint.service_id),
        slot=endpoint.slot,
        name=endpoint.name,
        aliases=tuple(endpoint.aliases),
        addresses=tuple(endpoint.addresses),
        is_running=endpoint.running,
        is_serving=endpoint.serving,
        is_named_early=endpoint.named_early,
        version=endpoint.version,
    )


def _service_from_pb(service: pb.NetworkService) -> TableService:
    return TableService(
        id=ServiceId(service.id),
        name=service.name,
        aliases=tuple(service.aliases),
        virtual_ips=tuple(service.virtual_ips),
        ports=tuple(
            TablePort(
                protocol=port.protocol,
                published=port.published,
                target=port.target,
                options=PublishOptions(
                    host_ip=port.host_ip,
                    is_sticky=port.sticky,
                    prefers_local=port.prefers_local,
                    proxy_protocol=port.proxy_protocol,
                ),
            )
            for port in service.ports
        ),
        labels=dict(service.labels),
        created_at=service.created_at,
        split=(
            TableSplit(service.split.percent, tuple(service.split.versions), tuple(service.split.withdrawn))
            if service.HasField("split")
            else None
        ),
        is_near=service.near,
    )
