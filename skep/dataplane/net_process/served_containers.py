"""Manages the containers that the net process serves: takes over, updates, repairs and hands over."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error, isolate, retry
from skep.aio.trees import discard_tree_now
from skep.dataplane.dns.networks import NetworkFiles
from skep.dataplane.dns.server import DnsSockets
from skep.dataplane.dns.upstream import QueryForwarder
from skep.dataplane.net_process.protocol import NameCounts, Named, SocketLabel, WaitingQuery
from skep.dataplane.net_process.served_container import ContainerRecord, ServedContainer, SharedResources
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.plan.flows import ACCEPTED_S
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.linux.files import NEW_SUFFIX, is_no_file
from skep.model.values.ids import NetworkId
from skep.paths import Paths

log = structlog.get_logger()

_REFRESH_S = 8.0
"""Seconds that a caller waits until all namespaces are updated.  Slower updates continue in the background."""
_REPAIR_PAUSE_S = 1.0
"""Seconds to pause after a repair of one namespace, so that a program that changes our tables all the time costs
little.
"""
_REST = 20
"""A namespace's flows are read for a time, and then none for so many times as long.

The kernel reads the flows of all namespaces (9 ms), and an update removes backends for as long as it takes.
"""
_PENDING_MAX = 512
"""Limit for the pending queries that are handed over.  Clients repeat the others."""


class _Work(IntEnum):
    """Scheduled work in a namespace.  A larger value includes the smaller ones."""

    APPLY = 1
    REPAIR = 2
    OPEN = 3


class _Loss(NamedTuple):
    """The time at which the first of ``addresses`` has lost a backend."""

    at: float
    addresses: set[str]


class ServedContainers:
    """All served containers.

    ``new_id`` returns 16 random bits.  ``start_task`` starts a supervised task whose failure does not end others."""

    def __init__(
        self,
        paths: Paths,
        namespaces: Namespaces,
        *,
        clock: Clock,
        rng: Callable[[], float],
        new_id: Callable[[], int],
        start_task: Callable[[Awaitable[None]], asyncio.Task[None]],
    ) -> None:
        self._directory = paths.names
        self._networks = NetworkFiles(paths.tables)
        self._clock = clock
        self._rng = rng
        self._start_task = start_task
        self._forwarder = QueryForwarder(clock, new_id)
        self._environment = SharedResources(
            paths.names, namespaces, self._networks, self._forwarder, rng, start_task
        )
        self.served: dict[str, ServedContainer] = {}
        self._handed_over: dict[str, DnsSockets] = {}
        """Sockets of containers whose records could not be read yet."""
        self._applying: dict[ServedContainer, asyncio.Future[bool]] = {}
        self._work: dict[str, _Work] = {}
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._losses: dict[str, _Loss] = {}
        """Containers with virtual addresses that have lost a backend since their flows were read, oldest first."""
        self._is_redirecting = False
        self.repairs = Repairs()

    def list(self) -> Sequence[Named]:
        """Return the containers that are served."""
        return tuple(one.named for one in self.served.values())

    def counts(self) -> NameCounts:
        """Return the counters of all containers' name servers."""
        counts = self._forwarder.counts
        return NameCounts(
            questions=tuple(counts.questions.items()),
            responses=tuple((*key, number) for key, number in counts.responses.items()),
            upstream_timeouts=counts.upstream_timeouts,
            upstream_failures=counts.upstream_failures,
            in_flight=self._forwarder.in_flight,
        )

    def take_over(
        self, sockets: Mapping[SocketLabel, socket.socket], pending: Iterable[WaitingQuery]
    ) -> None:
        """Serve the containers that an earlier process has saved.  Uses the sockets that it has handed over.

        A record that cannot be read at present is retried.  The other containers are served meanwhile.
        """
        self._handed_over = {
            id: DnsSockets(udp, sockets[SocketLabel(id, "tcp")])
            for (id, kind), udp in ((msgspec.structs.astuple(label), one) for label, one in sockets.items())
            if kind == "udp" and SocketLabel(id, "tcp") in sockets
        }
        try:
            self._take_all()
        except OSError:
            again = retry(self._take_again, "containers without names yet", clock=self._clock, rng=self._rng)
            self._start_task(again)
        self._respond(pending)

    async def _take_again(self) -> None:
        self._take_all()

    def _take_all(self) -> None:
        """Serve the containers whose records can be read.  Raises: OSError: some record cannot be read."""
        self._directory.mkdir(parents=True, exist_ok=True)
        failure: OSError | None = None
        for path in sorted(self._directory.iterdir()):
            try:
                self._take(path)
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure
        self._close_handed_over()

    def _take(self, path: Path) -> None:
        if path.name in self.served:
            return
        record = None if path.name.endswith(NEW_SUFFIX) else _read(path)
        if record is None or not record.is_same_namespace():
            discard_tree_now(path)  # it may be a directory
            return
        id = record.named.id
        served = self.served[id] = self.new_served(record)
        if (earlier := self._handed_over.pop(id, None)) is not None:
            served.adopt(earlier)
        self._schedule(id, _Work.OPEN)

    def _close_handed_over(self) -> None:
        for sockets in self._handed_over.values():
            sockets.close()
        self._handed_over.clear()

    async def serve(self, named: Named) -> None:
        """Serve the container ``named``, or update it if it has changed.  Raises: FailedPrecondition."""
        record, earlier = ContainerRecord(named), self._handed_over.pop(named.id, None)
        pending: tuple[WaitingQuery, ...] = ()
        old = self.served.get(named.id)
        if old is not None:
            if old.named == named and old.is_open():
                return
            pending = self._paused(old)
            if old.record.is_same_namespace():
                record, earlier = msgspec.structs.replace(old.record, named=named), old.release_sockets()
            old.close()
        served = self.served[named.id] = self.new_served(record)
        if earlier is not None:
            served.adopt(earlier)
        try:
            await served.open()
        except (SkepError, OSError) as error:
            if self.served.get(named.id) is served:
                self.forget(named.id)
            raise FailedPrecondition(f"cannot serve names in the container's namespace: {error}") from error
        self._respond(pending)

    def forget(self, id: str) -> None:
        """Stop serving the container.  Does nothing if it is not served."""
        for held in (self.served.pop(id, None), self._handed_over.pop(id, None)):
            if held is not None:
                held.close()
        (self._directory / id).unlink(missing_ok=True)
        self._networks.keep(
            attachment.network for one in self.served.values() for attachment in one.named.networks
        )

    async def refresh(self, networks: Iterable[NetworkId], within_s: float = _REFRESH_S) -> None:
        """Reload the tables of ``networks``, or of all networks if empty.

        Returns when every namespace with virtual addresses of these networks is updated.  Namespaces that are outdated
        for another reason are not waited for.

        Raises: Unavailable: some namespaces were not updated within ``within_s``.  They are updated in the background.
        """
        ids = frozenset(networks) or frozenset(self._networks.known())
        changed = self._networks.refresh(ids)
        outdated = {id: served for id, served in self.served.items() if served.virtual.mark_changed(changed)}
        for id, served in self.served.items():
            if served.has_other_subnets():
                self._schedule(id, _Work.OPEN)
        touched = {id: served for id, served in outdated.items() if served.virtual.networks & ids}
        done = await self._apply_all(touched, within_s)
        for id in outdated.keys() - done:
            self._schedule(id, _Work.APPLY)
        if failed := touched.keys() - done:
            raise Unavailable(
                f"{len(failed)} of {len(touched)} containers do not have the new virtual addresses yet"
            )
        if unread := self._networks.unread.intersection(ids):
            raise Unavailable(f"tables of {len(unread)} networks cannot be read at present")

    def pause(self) -> tuple[WaitingQuery, ...]:
        """Stop serving and return the pending queries for the next process."""
        pending = tuple(one for served in self.served.values() for one in self._paused(served))
        return pending[:_PENDING_MAX]

    def resume(self, pending: Iterable[WaitingQuery]) -> None:
        """Serve again after ``pause``, because no process has taken over."""
        for served in self.served.values():
            served.resume()
        self._respond(pending)

    def sockets(self) -> Mapping[SocketLabel, socket.socket]:
        """Return the sockets of all containers, including containers whose records could not be read yet."""
        held = {id: one.sockets for id, one in self.served.items() if one.sockets is not None}
        return {
            SocketLabel(id, kind): opened
            for id, one in (held | self._handed_over).items()
            for kind, opened in (("udp", one.udp), ("tcp", one.tcp))
        }

    def close(self) -> None:
        """Close all sockets."""
        for served in self.served.values():
            served.close()
        self._close_handed_over()

    # ----------------------------------------------------------------------------------------------------------

    def new_served(self, record: ContainerRecord) -> ServedContainer:
        id = record.named.id
        return ServedContainer(
            self._environment,
            record,
            lambda: self._schedule(id, _Work.REPAIR),
            lambda addresses: self._note_lost_backend(id, addresses),
        )

    def _note_lost_backend(self, id: str, addresses: Iterable[str]) -> None:
        self._losses.setdefault(id, _Loss(self._clock.monotonic(), set())).addresses.update(addresses)
        if not self._is_redirecting:
            self._is_redirecting = True
            self._start_task(self._redirect_unaccepted())

    async def _redirect_unaccepted(self) -> None:
        """Redirect connections that a removed backend has not accepted.

        Otherwise a client would get no response from a lost node for as long as it repeats its request, although
        others serve.
        """
        try:
            while self._losses:
                id, loss = next(iter(self._losses.items()))
                await self._clock.sleep(max(0.0, loss.at + ACCEPTED_S - self._clock.monotonic()))
                del self._losses[id]
                began = self._clock.monotonic()
                if (served := self.served.get(id)) is not None:
                    redirection = served.redirect_unaccepted(loss.addresses)
                    await isolate(redirection, "connections to removed backends not redirected")
                await self._clock.sleep(_REST * (self._clock.monotonic() - began))
        finally:
            self._is_redirecting = False

    def _paused(self, served: ServedContainer) -> tuple[WaitingQuery, ...]:
        return tuple(WaitingQuery(served.named.id, *one) for one in served.pause())

    def _respond(self, pending: Iterable[WaitingQuery]) -> None:
        for one in pending:
            if (served := self.served.get(one.container)) is not None:
                served.respond(one.message, (one.address, one.port))

    async def _apply_all(self, served: Mapping[str, ServedContainer], within_s: float) -> frozenset[str]:
        """Apply the virtual addresses of ``served``.

        Return the ids of containers that were updated, or have ended, in time.

        The other updates continue, because a thread that writes into a namespace cannot be interrupted, and two threads
        must not write at once.
        """
        results = {id: self._application(one) for id, one in served.items()}
        if results:
            await asyncio.wait(results.values(), timeout=within_s)
        return frozenset(id for id, result in results.items() if result.done() and result.result())

    def _application(self, served: ServedContainer) -> asyncio.Future[bool]:
        """Return a future that tells whether the container's virtual addresses are up to date.

        All callers share one task, because otherwise tasks would pile up.
        """
        if (known := self._applying.get(served)) is not None:
            return known
        result = self._applying[served] = asyncio.get_running_loop().create_future()

        async def apply() -> None:
            is_done = False
            try:
                await served.virtual.apply()
                is_done = True
            except (SkepError, OSError) as error:
                # the container has ended and will be forgotten
                is_done = not Path(served.named.netns).exists()
                if not is_done:
                    reason = describe_error(error)
                    log.warning("virtual addresses not updated", container=served.named.id, reason=reason)
            finally:
                del self._applying[served]
                result.set_result(is_done)

        self._start_task(apply())
        return result

    def _schedule(self, id: str, work: _Work) -> None:
        self._work[id] = max(self._work.get(id, work), work)
        if id not in self._workers:
            self._workers[id] = self._start_task(self._run(id))

    async def _run(self, id: str) -> None:
        """Do the container's scheduled work until none is left or the container ends."""
        backoff, failure = Backoff(rng=self._rng), ""
        try:
            while (work := self._work.pop(id, None)) is not None and (
                served := self.served.get(id)
            ) is not None:
                try:
                    await self._do(served, work)
                except (SkepError, OSError) as error:
                    if not Path(served.named.netns).exists():
                        return  # the container will be forgotten
                    if (reason := describe_error(error)) != failure:
                        log.warning("network not repaired yet", container=id, reason=reason)
                        failure = reason
                    self._work[id] = max(self._work.get(id, work), work)
                    await backoff.sleep(self._clock)
        finally:
            self._workers.pop(id, None)

    async def _do(self, served: ServedContainer, work: _Work) -> None:
        match work:
            case _Work.APPLY:
                await served.virtual.apply()
            case _Work.REPAIR:
                await served.repair()
                self.repairs.record(served.named.id, ["rules"])
                await self._clock.sleep(_REPAIR_PAUSE_S)
            case _Work.OPEN:
                await served.open()


def _read(path: Path) -> ContainerRecord | None:
    """Read a record.  Return None if it does not exist or is damaged: the node then registers the container again.

    Raises: OSError: it cannot be read at present.
    """
    try:
        record = msgspec.msgpack.decode(path.read_bytes(), type=ContainerRecord)
        if record.named.id != path.name:
            raise msgspec.ValidationError(f"it is the record of container {record.named.id}")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("invalid record of container names removed", path=str(path), reason=str(error))
        return None
    except OSError as error:
        if is_no_file(error):
            return None
        raise
    return record
