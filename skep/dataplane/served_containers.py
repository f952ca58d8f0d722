"""All containers that the net process serves: taken over, served, kept as the tables are, repaired, given on."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.dataplane.dns.networks import Networks
from skep.dataplane.dns.server import Sockets
from skep.dataplane.dns.upstream import Forwarder
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.netns.repairs import Repairs
from skep.dataplane.protocol import Label, Named, Waiting
from skep.dataplane.served_container import ContainerRecord, Environment, ServedContainer
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.linux.files import is_no_file
from skep.model.ids import NetworkId
from skep.paths import Paths

log = structlog.get_logger()

_REFRESH_S = 8.0
"""How long a caller waits until all namespaces are as the tables say; what takes longer goes on by itself."""
_REPAIR_PAUSE_S = 1.0
"""Between two repairs of one namespace, so that another program that keeps changing them costs little."""
_WAITING_MAX = 512
"""Questions that are handed over; clients ask the others again."""


class _Need(IntEnum):
    """What a namespace needs; the larger includes the smaller."""

    APPLY = 1
    REPAIR = 2
    OPEN = 3


class ServedContainers:
    """``new_id``: 16 bits that cannot be guessed; ``start_task``: gives a task a parent, and contains its failure."""

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
        self._networks = Networks(paths.tables)
        self._clock = clock
        self._rng = rng
        self._start_task = start_task
        self._environment = Environment(
            paths.names, namespaces, self._networks, Forwarder(clock, new_id), rng, start_task
        )
        self._served: dict[str, ServedContainer] = {}
        self._needs: dict[str, _Need] = {}
        self._mending: dict[str, asyncio.Task[None]] = {}
        self.repairs = Repairs()

    def list(self) -> Sequence[Named]:
        return tuple(one.named for one in self._served.values())

    def take_over(self, sockets: Mapping[Label, socket.socket], waiting: Iterable[Waiting]) -> None:
        """Serve what an earlier process wrote down: at its sockets where it gave them, else at new ones."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._directory.iterdir()):
            record = _read(path)
            if record is None or not record.is_same_namespace():
                path.unlink(missing_ok=True)
                continue
            id = record.named.id
            udp, tcp = sockets.get(Label(id, "udp")), sockets.get(Label(id, "tcp"))
            served = self._served[id] = self._new(record)
            if udp is not None and tcp is not None:
                served.adopt(Sockets(udp, tcp))
            self._mend(id, _Need.OPEN)
        self._answer(waiting)

    async def serve(self, named: Named) -> None:
        """Have names in the namespace of ``named``, as it says.  Raises: FailedPrecondition."""
        record, had = ContainerRecord(named), None
        waiting: tuple[Waiting, ...] = ()
        old = self._served.get(named.id)
        if old is not None:
            if old.named == named and old.is_in_order():
                return
            waiting = self._paused(old)
            if old.record.is_same_namespace():
                record, had = msgspec.structs.replace(old.record, named=named), old.give_sockets()
            old.close()
        served = self._served[named.id] = self._new(record)
        if had is not None:
            served.adopt(had)
        try:
            await served.open()
        except (SkepError, OSError) as error:
            if self._served.get(named.id) is served:
                self.forget(named.id)
            raise FailedPrecondition(f"no names in the container's namespace: {error}") from error
        self._answer(waiting)

    def forget(self, id: str) -> None:
        """Stop serving the container; ignored when it is not served."""
        served = self._served.pop(id, None)
        if served is not None:
            served.close()
        (self._directory / id).unlink(missing_ok=True)
        self._networks.keep(place.network for one in self._served.values() for place in one.named.networks)

    async def refresh(self, networks: Iterable[NetworkId]) -> None:
        """These tables (none: all) are others now; return when every namespace is as they say.

        Raises: Unavailable: some are not yet.
        """
        changed = self._networks.refresh(tuple(networks) or self._networks.known())
        touched = {id: served for id, served in self._served.items() if served.virtual.mark_changed(changed)}
        for id, served in self._served.items():
            if served.has_other_subnets():
                self._mend(id, _Need.OPEN)
        failed = [
            id
            for id, is_done in zip(touched, await self._settled(touched.values()), strict=True)
            if not is_done
        ]
        for id in failed:
            self._mend(id, _Need.APPLY)
        if failed:
            raise Unavailable(f"{len(failed)} of {len(touched)} containers lack the new virtual addresses")

    def pause(self) -> tuple[Waiting, ...]:
        """Answer nothing more; the questions that wait, for the next process."""
        waiting = tuple(one for served in self._served.values() for one in self._paused(served))
        return waiting[:_WAITING_MAX]

    def resume(self, waiting: Iterable[Waiting]) -> None:
        """No process took it over: go on."""
        for served in self._served.values():
            served.resume()
        self._answer(waiting)

    def sockets(self) -> Mapping[Label, socket.socket]:
        """The sockets of all containers."""
        return {
            Label(id, kind): opened
            for id, served in self._served.items()
            if served.sockets is not None
            for kind, opened in (("udp", served.sockets.udp), ("tcp", served.sockets.tcp))
        }

    def close(self) -> None:
        for served in self._served.values():
            served.close()

    # ----------------------------------------------------------------------------------------------------------

    def _new(self, record: ContainerRecord) -> ServedContainer:
        id = record.named.id
        return ServedContainer(self._environment, record, lambda: self._mend(id, _Need.REPAIR))

    def _paused(self, served: ServedContainer) -> tuple[Waiting, ...]:
        return tuple(Waiting(served.named.id, *one) for one in served.pause())

    def _answer(self, waiting: Iterable[Waiting]) -> None:
        for one in waiting:
            if (served := self._served.get(one.container)) is not None:
                served.answer(one.message, (one.address, one.port))

    async def _settled(self, served: Iterable[ServedContainer]) -> Sequence[bool]:
        """Which of ``served`` have come to be as they should."""

        async def settled(one: ServedContainer) -> bool:
            try:
                async with asyncio.timeout(_REFRESH_S):
                    await one.virtual.apply()
            except (SkepError, OSError, TimeoutError) as error:
                if not Path(one.named.netns).exists():
                    return True  # the container is gone, and will be forgotten
                log.warning("virtual addresses are out of date", container=one.named.id, reason=str(error))
                return False
            return True

        return await asyncio.gather(*map(settled, served))

    def _mend(self, id: str, need: _Need) -> None:
        self._needs[id] = max(self._needs.get(id, need), need)
        if id not in self._mending:
            self._mending[id] = self._start_task(self._mend_one(id))

    async def _mend_one(self, id: str) -> None:
        """Do what the container's namespace needs until it needs nothing more, or is gone."""
        backoff = Backoff(rng=self._rng)
        try:
            while (need := self._needs.pop(id, None)) is not None and (
                served := self._served.get(id)
            ) is not None:
                try:
                    await self._meet(served, need)
                except (SkepError, OSError) as error:
                    if not Path(served.named.netns).exists():
                        return  # it will be forgotten
                    log.warning(
                        "names and virtual addresses not repaired yet", container=id, reason=str(error)
                    )
                    self._needs[id] = max(self._needs.get(id, need), need)
                    await backoff.sleep(self._clock)
        finally:
            self._mending.pop(id, None)

    async def _meet(self, served: ServedContainer, need: _Need) -> None:
        match need:
            case _Need.APPLY:
                await served.virtual.apply()
            case _Need.REPAIR:
                await served.repair()
                self.repairs.count(["rules"])
                log.warning("network repaired", container=served.named.id, rules=1)
                await self._clock.sleep(_REPAIR_PAUSE_S)
            case _Need.OPEN:
                await served.open()


def _read(path: Path) -> ContainerRecord | None:
    """None: that is none.  Raises: OSError: it cannot be read now."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=ContainerRecord)
    except msgspec.DecodeError:
        return None
    except OSError as error:
        if is_no_file(error):
            return None
        raise
