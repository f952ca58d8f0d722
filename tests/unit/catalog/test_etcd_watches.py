"""Watches of the view for etcd's clients: none of them lacks an event without being cancelled."""

import asyncio
import gc
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from skep.catalog import etcd_view_pb2
from skep.catalog.etcd import EtcdView, _Watches
from skep.catalog.etcd_keys import KEPT_MAX
from skep.catalog.following import PACE_S, KnownCatalog, first_index_at
from skep.model.catalog import CatalogInstance, CatalogService, ServiceCatalog
from skep.model.values.times import SECOND_NS
from tests.support.store.store_transactions import eventually

pb: Any = etcd_view_pb2
SERVICES = b"/skep/services/"
FIRST = 100


class Client:
    """The other end of a stream of watches, which can stop reading."""

    def __init__(self) -> None:
        self.responses: list[Any] = []
        self.is_blocked = False
        self._reads, self._sent, self._has_sent = asyncio.Event(), bytearray(), asyncio.Event()
        self.read()

    def read(self) -> None:
        self._reads.set()

    def stop_reading(self) -> None:
        self._reads.clear()

    def watch(self, id: int, **fields: Any) -> None:
        """Create a watch of the services."""
        end = b"/skep/services0"
        self.request(create_request={"key": SERVICES, "range_end": end, "watch_id": id} | fields)

    def request(self, **fields: Any) -> None:
        data = pb.WatchRequest(**fields).SerializeToString()
        self._sent += struct.pack("!?I", False, len(data)) + data
        self._has_sent.set()

    async def recv_data(self, size: int, _within_s: float | None = None) -> bytes:
        while len(self._sent) < size:
            self._has_sent.clear()
            await self._has_sent.wait()
        data = bytes(self._sent[:size])
        del self._sent[:size]
        return data

    async def send_message(self, message: Any) -> None:
        self.is_blocked = not self._reads.is_set()
        await self._reads.wait()
        self.responses.append(message)

    def known(self) -> set[str]:
        """Return the instances that the client knows from the events."""
        keys: set[bytes] = set()
        for event in (event for response in self.responses for event in response.events):
            (keys.add if event.type == pb.Event.PUT else keys.discard)(event.kv.key)
        return {key.decode().rpartition("/")[2] for key in keys}


class Served:
    """A view with the catalog of one service."""

    def __init__(self) -> None:
        self.known = KnownCatalog(FIRST)
        self.change("first")
        self.view = EtcdView(self.known)

    def change(self, *ids: str) -> None:
        instances = tuple(CatalogInstance(id=id, address="10.0.0.1", port=80) for id in ids)
        service = CatalogService(name="web", instances=instances)
        self.known.replace("-".join(ids), ServiceCatalog(services=(service,)))

    @asynccontextmanager
    async def client(self, **fields: Any) -> AsyncIterator[Client]:
        """A client with a watch, whose response it has."""
        client = Client()
        handler = self.view.methods()["/etcdserverpb.Watch/Watch"]
        serving = asyncio.create_task(handler.respond(client))  # type: ignore[arg-type]
        client.watch(1, **fields)
        await eventually(lambda: client.responses)
        yield client
        serving.cancel()
        await asyncio.wait([serving])

    async def changes(self, count: int) -> None:
        """Make changes, each a revision, because another client reads it."""
        async with self.client() as other:
            for number in range(count):
                self.change(f"t{number}")
                await eventually(lambda last=f"t{number}": last in other.known())


async def test_a_client_that_reads_too_slowly_is_cancelled_and_reads_the_keys_again() -> None:
    served = Served()
    async with served.client() as client:
        client.stop_reading()
        served.change("first", "second")
        await eventually(lambda: client.is_blocked)
        await served.changes(KEPT_MAX + 8)
        client.read()
        await eventually(lambda: client.responses[-1].canceled)
        assert client.known() == {"second"}, "it lacks the removal, and the cancellation says so"
        oldest = served.known.index - KEPT_MAX + 1
        assert client.responses[-1].compact_revision == oldest


async def test_a_client_that_stops_for_some_changes_gets_every_event() -> None:
    served = Served()
    async with served.client() as client:
        client.stop_reading()
        served.change("first", "second")
        await eventually(lambda: client.is_blocked)
        await served.changes(KEPT_MAX - 4)
        client.read()
        await eventually(lambda: client.known() == {f"t{KEPT_MAX - 5}"})
        assert not any(response.canceled for response in client.responses)


@pytest.mark.parametrize(
    ("start", "is_cancelled"), [(FIRST, True), (FIRST + 1, False), (FIRST + 2, False), (FIRST + 3, True)]
)
async def test_a_watch_of_another_run_is_cancelled(start: int, *, is_cancelled: bool) -> None:
    served = Served()
    async with served.client(start_revision=start) as client:
        served.change("second")
        await eventually(lambda: client.responses[-1].canceled or client.known() >= {"second"})
        assert client.responses[-1].canceled == is_cancelled
        assert bool(client.responses[-1].compact_revision) == is_cancelled


async def test_a_watch_begins_after_the_revision_of_its_response() -> None:
    served = Served()
    async with served.client() as client:
        client.stop_reading()
        client.watch(2)
        await eventually(lambda: client.is_blocked)
        await served.changes(1)
        client.read()
        await eventually(lambda: client.responses[-1].events and client.responses[-1].watch_id == 2)
        created, changed = (one for one in client.responses if one.watch_id == 2)
        assert created.header.revision < changed.header.revision


async def test_a_report_of_progress_follows_the_events_that_it_covers() -> None:
    served = Served()
    async with served.client() as client:
        client.request(progress_request={})
        served.change("second")
        await eventually(lambda: client.responses[-1].watch_id == -1)
        _, events, progress = client.responses
        assert progress.header.revision == events.header.revision


async def test_nothing_is_kept_of_cancelled_watches() -> None:
    served = Served()
    async with served.client() as client:
        for id in range(1, 20):
            client.request(cancel_request={"watch_id": id})
            client.watch(id + 1)
        client.request(cancel_request={"watch_id": 20})
        await eventually(lambda: sum(one.canceled for one in client.responses) == 20)
        [watches] = (one for one in gc.get_objects() if isinstance(one, _Watches) and one.stream is client)
        assert [len(value) for value in vars(watches).values() if isinstance(value, dict)] == [0]


def test_an_index_grows_faster_than_the_catalog_changes() -> None:
    hour_s, start_ns = 3600, 1_800_000_000 * SECOND_NS
    last = first_index_at(start_ns) + hour_s / PACE_S
    assert first_index_at(start_ns + hour_s * SECOND_NS) > last
