"""A read-only view of the catalog in etcd's v3 interface: ranges, transactions of ranges, and watches.

Changes are refused.  ``etcd_keys`` has the keys.

A watch that would lack events is cancelled with ``compact_revision``, after which clients read the keys again.  These
are watches of changes before the kept ones, and unlike in etcd also watches of revisions in the future: a client has
such a revision only from an earlier run of this view, whose later changes are unknown to this run.

Source: etcd, api/etcdserverpb/rpc.proto and server/etcdserver/api/v3rpc.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError, Message

from skep import __version__
from skep.aio.race import LostRace, run_unless
from skep.catalog import etcd_view_pb2 as pb
from skep.catalog.etcd_keys import KeyHistory, KeysRevision, StoredKey, is_within, values_of
from skep.catalog.following import KnownCatalog
from skep.errors import InvalidArgument, PermissionDenied, Unavailable, Unimplemented, reason_of
from skep.model.networks.addresses import joined
from skep.rpc.errors import LOST_PEER
from skep.rpc.headers import CallHeaders
from skep.rpc.server import ServerConnection, ServerStream
from skep.rpc.serving import LIMITS, Both, ServedMethod, UnaryHandler, connection, receive_message
from skep.rpc.status import CallFailed, StatusCode

CONNECTIONS_MAX: Final = 128
"""Largest number of connections.  confd has one for each process."""
WATCHES_MAX: Final = 256
"""Largest number of watches of one stream.  confd has one for each key of a template."""
OPERATIONS_MAX: Final = 128
"""Largest number of ranges in a transaction, as in etcd."""
_MEMBER: Final = 1
"""Id of the cluster and of its only member, where etcd has random ones."""
_COMPACTED = "etcdserver: mvcc: required revision has been compacted"
_FUTURE = "etcdserver: mvcc: required revision is a future revision"
_READ_ONLY = "etcdserver: permission denied: this view of Skep's catalog is read-only"
_CHANGES: Final = (
    *("KV/Put", "KV/DeleteRange", "KV/Compact", "Lease/LeaseGrant", "Lease/LeaseRevoke"),
    *("Maintenance/Defragment", "Maintenance/MoveLeader", "Cluster/MemberAdd", "Cluster/MemberRemove"),
)


class EtcdView:
    """Answers etcd's calls from the known catalog."""

    def __init__(self, known: KnownCatalog) -> None:
        self._known = known
        self._history = KeyHistory(max(known.index - 1, 1))
        self._advance()

    def methods(self) -> Mapping[str, ServedMethod]:
        """Return the handlers by their paths."""
        refused = {f"/etcdserverpb.{path}": Both(_refuse) for path in _CHANGES}
        return {
            **refused,
            "/etcdserverpb.KV/Range": UnaryHandler(pb.RangeRequest, self._range),
            "/etcdserverpb.KV/Txn": UnaryHandler(pb.TxnRequest, self._txn),
            "/etcdserverpb.Watch/Watch": Both(self._watch),
            "/etcdserverpb.Maintenance/Status": UnaryHandler(pb.StatusRequest, self._status),
            "/etcdserverpb.Cluster/MemberList": UnaryHandler(pb.MemberListRequest, self._members),
        }

    def _advance(self) -> None:
        """Take the present catalog as a revision, unless it is one already."""
        if self._known.index > self._history.last.number:
            self._history.advance(self._known.index, values_of(self._known))

    def _header(self) -> pb.ResponseHeader:
        number = max(self._known.index, self._history.last.number)
        return pb.ResponseHeader(cluster_id=_MEMBER, member_id=_MEMBER, revision=number, raft_term=1)

    async def _range(self, request: pb.RangeRequest, _: CallHeaders) -> Message:
        self._advance()
        return self._ranged(request)

    async def _txn(self, request: pb.TxnRequest, _: CallHeaders) -> Message:
        """Answer several ranges at one revision.  Raises: Unimplemented, PermissionDenied, InvalidArgument."""
        self._advance()
        if request.compare:
            raise Unimplemented("this view has no comparisons: send a transaction of ranges only")
        if len(request.success) > OPERATIONS_MAX:
            raise InvalidArgument("etcdserver: too many operations in txn request")
        if any(one.WhichOneof("request") != "request_range" for one in request.success):
            raise PermissionDenied(_READ_ONLY)
        found = [pb.ResponseOp(response_range=self._ranged(one.request_range)) for one in request.success]
        return pb.TxnResponse(header=self._header(), succeeded=True, responses=found)

    def _ranged(self, request: pb.RangeRequest) -> pb.RangeResponse:
        """Raises: CallFailed: the revision cannot be read."""
        header = self._header()
        if request.revision > header.revision:
            raise CallFailed(StatusCode.OUT_OF_RANGE, _FUTURE)
        revision = self._history.at(request.revision or header.revision)
        if revision is None:
            raise CallFailed(StatusCode.OUT_OF_RANGE, _COMPACTED)
        found = [pair for pair in revision.keys.items() if is_within(pair[0], request.key, request.range_end)]
        found = [pair for pair in found if _is_selected(pair[1], request)]
        if request.sort_order != pb.RangeRequest.NONE or request.sort_target != pb.RangeRequest.KEY:
            found.sort(key=lambda pair: _sort_key(pair, request.sort_target))
        if request.sort_order == pb.RangeRequest.DESCEND:
            found.reverse()
        shown = found[: request.limit] if request.limit > 0 else found
        if request.count_only:
            shown = []
        return pb.RangeResponse(
            header=header,
            count=len(found),
            more=0 < request.limit < len(found),
            kvs=[_key_value(*pair, has_value=not request.keys_only) for pair in shown],
        )

    async def _status(self, _: pb.StatusRequest, __: CallHeaders) -> Message:
        return pb.StatusResponse(header=self._header(), version=__version__, leader=_MEMBER)

    async def _members(self, _: pb.MemberListRequest, __: CallHeaders) -> Message:
        return pb.MemberListResponse(header=self._header(), members=[pb.Member(ID=_MEMBER, name="skep")])

    # -- watches --------------------------------------------------------------------------------------------------

    async def _watch(self, stream: ServerStream) -> None:
        watches = _Watches(stream)
        try:
            await run_unless(self._receive(watches), self._send(watches))
        except LostRace:
            return

    async def _receive(self, watches: "_Watches") -> None:
        """Create and cancel watches until the client closes the stream."""
        while (data := await receive_message(watches.stream)) is not None:
            try:
                request = pb.WatchRequest.FromString(data)
            except DecodeError as error:
                raise InvalidArgument("the message cannot be decoded") from error
            self._advance()
            match request.WhichOneof("request_union"):
                case "create_request":
                    await self._create(watches, request.create_request)
                case "cancel_request":
                    id = request.cancel_request.watch_id
                    if watches.open.pop(id, None) is not None:
                        await watches.send(self._canceled(id))
                case "progress_request":
                    # A client resumes after this revision, so it has to have the events up to it.
                    response = pb.WatchResponse(header=self._header(), watch_id=-1)
                    await self._send_new(watches)
                    await watches.send(response)

    async def _create(self, watches: "_Watches", request: pb.WatchCreateRequest) -> None:
        id = request.watch_id or watches.next_id
        watches.next_id = max(watches.next_id, id) + 1
        created = pb.WatchResponse(header=self._header(), watch_id=id, created=True)
        # Computed before the response, which can take long: without a start, the watch begins after this revision.
        start = request.start_revision or created.header.revision + 1
        await watches.send(created)
        if id in watches.open or len(watches.open) >= WATCHES_MAX:
            reason = "etcdserver: too many watches of one stream, or a repeated id"
            await watches.send(self._canceled(id, reason))
            return
        watches.open[id] = _Watch(request, start - 1)
        await self._send_new(watches)

    def _canceled(self, id: int, reason: str = "", compacted: int = 0) -> pb.WatchResponse:
        return pb.WatchResponse(
            header=self._header(),
            watch_id=id,
            canceled=True,
            cancel_reason=reason,
            compact_revision=compacted,
        )

    async def _send(self, watches: "_Watches") -> None:
        """Send the events of each change until cancelled."""
        try:
            while True:
                index = self._known.index
                self._advance()
                await self._send_new(watches)
                await self._known.wait_changed(index)
        except LOST_PEER:
            return

    async def _send_new(self, watches: "_Watches") -> None:
        """Send the new events of each watch, and cancel a watch that would lack events."""
        async with watches.lock:
            for id, watch in list(watches.open.items()):
                while watches.open.get(id) is watch:
                    if reason := self._gap(watch):
                        del watches.open[id]
                        compacted = self._history.compacted + 1
                        await watches.stream.send_message(self._canceled(id, reason, compacted))
                        break
                    revision = next(self._history.after(watch.seen), None)
                    if revision is None:
                        break
                    watch.seen = revision.number
                    if events := _events(revision, watch.request):
                        response = pb.WatchResponse(header=self._header(), watch_id=id, events=events)
                        response.header.revision = revision.number
                        await watches.stream.send_message(response)

    def _gap(self, watch: "_Watch") -> str:
        """Return the reason why a watch would lack events, or an empty text."""
        if watch.seen < self._history.compacted:
            return _COMPACTED
        return _FUTURE if watch.seen > self._header().revision else ""


@dataclass
class _Watch:
    """A watch, and the revision up to which it has its events."""

    request: pb.WatchCreateRequest
    seen: int


class _Watches:
    """The watches of one stream by their ids."""

    def __init__(self, stream: ServerStream) -> None:
        self.stream = stream
        self.open: dict[int, _Watch] = {}
        self.next_id = 0
        self.lock = asyncio.Lock()

    async def send(self, response: pb.WatchResponse) -> None:
        """Send a response after the others."""
        async with self.lock:
            await self.stream.send_message(response)


def _events(revision: KeysRevision, request: pb.WatchCreateRequest) -> list[pb.Event]:
    found = []
    for change in revision.changes:
        kind = pb.Event.PUT if change.new is not None else pb.Event.DELETE
        is_left_out = int(kind) in [
            int(one) for one in request.filters
        ]  # NOPUT and NODELETE have the same numbers
        if is_left_out or not is_within(change.key, request.key, request.range_end):
            continue
        value = (
            _key_value(change.key, change.new)
            if change.new is not None
            else pb.KeyValue(key=change.key, mod_revision=revision.number)
        )
        old = _key_value(change.key, change.old) if request.prev_kv and change.old is not None else None
        found.append(pb.Event(type=kind, kv=value, prev_kv=old))
    return found


def _key_value(key: bytes, stored: StoredKey, *, has_value: bool = True) -> pb.KeyValue:
    return pb.KeyValue(
        key=key,
        value=stored.value if has_value else b"",
        create_revision=stored.created,
        mod_revision=stored.modified,
        version=stored.version,
    )


def _is_selected(stored: StoredKey, request: pb.RangeRequest) -> bool:
    """Return whether a key is within the request's bounds of revisions, which are 0 if unset."""
    bounds = (
        (stored.modified, request.min_mod_revision, request.max_mod_revision),
        (stored.created, request.min_create_revision, request.max_create_revision),
    )
    return all((not low or number >= low) and (not high or number <= high) for number, low, high in bounds)


def _sort_key(pair: tuple[bytes, StoredKey], target: int) -> tuple[int, bytes]:
    key, stored = pair
    match target:
        case pb.RangeRequest.VERSION:
            return stored.version, key
        case pb.RangeRequest.CREATE:
            return stored.created, key
        case pb.RangeRequest.MOD:
            return stored.modified, key
        case pb.RangeRequest.VALUE:
            return 0, stored.value
    return 0, key


async def _refuse(_: ServerStream) -> None:
    """Refuse a change.  Raises: PermissionDenied."""
    raise PermissionDenied(_READ_ONLY)


class _Connections:
    """Creates the protocol of each connection, and closes them at the end."""

    def __init__(self, view: EtcdView) -> None:
        self._methods = view.methods()
        self._open: set[ServerConnection] = set()

    def accept(self) -> asyncio.Protocol:
        """Return the protocol of a new connection, which only closes it if there are too many."""
        self._open = {one for one in self._open if one.is_open}
        if len(self._open) >= CONNECTIONS_MAX:
            return _Refused()
        made = connection(self._methods)
        self._open.add(made)
        return _Begun(made)

    async def close(self) -> None:
        """Close all connections."""
        for one in self._open:
            one.close()
        for one in self._open:
            await one.wait_closed()


class _Refused(asyncio.Protocol):
    """Closes the connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _Begun(asyncio.Protocol):
    """Begins HTTP/2 as soon as the transport is there, and lets the connection take over."""

    def __init__(self, made: ServerConnection) -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_protocol(self._made)
        self._made.begin(transport, LIMITS)


@asynccontextmanager
async def serving_keys(view: EtcdView, host: str, port: int) -> AsyncIterator[int]:
    """Serve during the block, and yield the port.  Raises: Unavailable: the address is taken."""
    connections = _Connections(view)
    try:
        server = await asyncio.get_running_loop().create_server(connections.accept, host, port)
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {joined(host, port)}: {reason_of(error)}. Choose another port."
        ) from error
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await connections.close()
