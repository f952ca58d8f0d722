"""etcd's key space, with every revision of every key, and transactions on it.  It uses neither time nor network.

All compares of a request, nested ones included, are evaluated on the state before it, as in etcd.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence

import msgspec

from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.errors import Compacted


class Stored(msgspec.Struct, frozen=True, gc=False):
    """One revision of one key.  ``value``: None if the key was deleted."""

    revision: int
    create_revision: int
    value: bytes | None


class Planned(msgspec.Struct, frozen=True):
    """A transaction with evaluated compares.  Nested transactions among its operations are also ``Planned``."""

    succeeded: bool
    operations: Sequence["pb.RequestOp | Planned"]


class KeyValues:
    """All keys at all revisions since the last compaction."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self._versions: dict[bytes, list[Stored]] = {}
        self._names: list[bytes] = []
        self._events: list[list[pb.Event]] = []
        """Events per revision, from revision 2 on."""

    def execute(self, request: pb.TxnRequest) -> pb.TxnResponse:
        """Execute ``request`` as one raft entry."""
        before = self.revision
        events: list[pb.Event] = []
        response = self._carried_out(self._planned(request), before + 1, events)
        if events:
            self.revision = before + 1
            self._events.append(events)
        _stamp(response, self.revision)
        return response

    def range(self, request: pb.RangeRequest, revision: int) -> pb.RangeResponse:
        """Return the requested keys as of ``revision``, or of the revision in the request.

        Raises: Compacted.
        """
        at = request.revision or revision
        if at < self.compacted:
            raise Compacted("the requested history is compacted")
        response = pb.RangeResponse(header=pb.ResponseHeader(revision=revision, cluster_id=1))
        limit = request.limit or len(self._names) + 1
        for name in self._named(request.key, request.range_end):
            stored = self._at(name, at)
            if stored is None or stored.value is None:
                continue
            if response.count == limit:
                response.more = True
                break
            response.count += 1
            if not request.count_only:
                response.kvs.append(_key_value(name, stored, with_value=not request.keys_only))
        return response

    def events(self, first: int, last: int) -> list[pb.Event]:
        """Return the events of these revisions, in order."""
        return [event for events in self._events[first - 2 : last - 1] for event in events]

    @property
    def present(self) -> Sequence[bytes]:
        """Return the existing keys, in order."""
        return [name for name in self._names if self._versions[name][-1].value is not None]

    def compact(self, revision: int) -> None:
        """Drop the history before ``revision``."""
        self.compacted = max(self.compacted, min(revision, self.revision))

    def as_of(self, revision: int) -> "KeyValues":
        """Return the key space restored from a snapshot of that revision."""
        restored = KeyValues()
        restored.revision, restored.compacted = revision, min(self.compacted, revision)
        restored._events = self._events[: revision - 1]
        for name, versions in self._versions.items():
            if kept := [one for one in versions if one.revision <= revision]:
                restored._versions[name] = kept
                insort(restored._names, name)
        return restored

    # -- inside --------------------------------------------------------------------------------------------

    def _planned(self, request: pb.TxnRequest) -> Planned:
        succeeded = all(map(self._holds, request.compare))
        chosen = request.success if succeeded else request.failure
        return Planned(
            succeeded,
            [self._planned(op.request_txn) if op.HasField("request_txn") else op for op in chosen],
        )

    def _carried_out(self, plan: Planned, revision: int, events: list[pb.Event]) -> pb.TxnResponse:
        response = pb.TxnResponse(succeeded=plan.succeeded)
        for operation in plan.operations:
            answer = response.responses.add()
            if isinstance(operation, Planned):
                answer.response_txn.CopyFrom(self._carried_out(operation, revision, events))
            elif operation.HasField("request_put"):
                self._write(operation.request_put.key, operation.request_put.value, revision, events)
                answer.response_put.SetInParent()
            elif operation.HasField("request_delete_range"):
                self._write(operation.request_delete_range.key, None, revision, events)
                answer.response_delete_range.SetInParent()
            else:
                answer.response_range.CopyFrom(self.range(operation.request_range, self.revision))
        return response

    def _write(self, name: bytes, value: bytes | None, revision: int, events: list[pb.Event]) -> None:
        versions = self._versions.get(name)
        if versions is None:
            versions = self._versions[name] = []
            insort(self._names, name)
        last = versions[-1] if versions else None
        exists = last is not None and last.value is not None
        if value is None and not exists:
            return
        create = last.create_revision if last is not None and exists else revision
        stored = Stored(revision, create, value)
        versions.append(stored)
        kind = pb.Event.DELETE if value is None else pb.Event.PUT
        events.append(pb.Event(type=kind, kv=_key_value(name, stored)))

    def _holds(self, compare: pb.Compare) -> bool:
        if compare.range_end:
            found = [self._at(name, self.revision) for name in self._named(compare.key, compare.range_end)]
            return all(_compares(compare, one) for one in found if one is not None and one.value is not None)
        return _compares(compare, self._at(compare.key, self.revision))

    def _at(self, name: bytes, revision: int) -> Stored | None:
        versions = self._versions.get(name)
        if not versions:
            return None
        if versions[-1].revision <= revision:
            return versions[-1]
        place = bisect_right(versions, revision, key=lambda stored: stored.revision)
        return versions[place - 1] if place else None

    def _named(self, first: bytes, end: bytes) -> Iterator[bytes]:
        if not end:
            if first in self._versions:
                yield first
            return
        place = bisect_left(self._names, first)
        while place < len(self._names) and self._names[place] < end:
            yield self._names[place]
            place += 1


def _compares(compare: pb.Compare, stored: Stored | None) -> bool:
    exists = stored is not None and stored.value is not None
    if compare.target == pb.Compare.CREATE:
        actual, wanted = (stored.create_revision if stored and exists else 0), compare.create_revision
    else:
        actual, wanted = (stored.revision if stored and exists else 0), compare.mod_revision
    if compare.result == pb.Compare.EQUAL:
        return actual == wanted
    assert compare.result == pb.Compare.LESS, "Skep compares for nothing else"
    return actual < wanted


def _key_value(name: bytes, stored: Stored, *, with_value: bool = True) -> pb.KeyValue:
    return pb.KeyValue(
        key=name,
        create_revision=stored.create_revision if stored.value is not None else 0,
        mod_revision=stored.revision,
        value=(stored.value or b"") if with_value else b"",
    )


def _stamp(response: pb.TxnResponse, revision: int) -> None:
    response.header.revision = revision
    response.header.cluster_id = 1
