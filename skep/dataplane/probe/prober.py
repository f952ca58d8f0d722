"""The probes of one node: when each peer is probed, what is known of the path to it, and what follows.

Each peer has a task, which asks it every ten seconds, at once when it is new.  What was measured goes in three
directions: to the managers (reports), to the other nodes (in answers), and to this node's overlays (their MTU, and
whether they leave checksums to the network card).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.aio.race import is_set_within
from skep.dataplane.plan.probe import PEERS_MAX, sound
from skep.dataplane.probe.data_path import DataPath
from skep.dataplane.probe.findings import is_news, reported
from skep.dataplane.probe.mtu import Measured
from skep.dataplane.probe.offload import Offload
from skep.dataplane.probe.port_probe import PortChecks
from skep.dataplane.probe.state_file import Kept, load, save
from skep.errors import SkepError
from skep.model.ids import NodeId
from skep.model.paths import PathPeer, PathReport, ProbeTargets

PERIOD_S = 10.0
RECHECK_S = 4.0
"""After a verdict that may be chance."""
PEERS_AT_FULL_PACE = 64


def pause_s(peers: int, random: float, *, is_settled: bool) -> float:
    """Seconds until the next round with one of so many ``peers``, spread by a quarter to each side.

    ``random``: from 0 to 1.
    """
    period = PERIOD_S if is_settled else RECHECK_S
    return period * max(1.0, peers / PEERS_AT_FULL_PACE) * (0.75 + 0.5 * random)


log = structlog.get_logger()

EXAMINATION_S = 15.0
AT_ONCE = 16
"""Peers that are asked at the same time."""
_GUEST_S = 2 * EXAMINATION_S
_RETRY_S_MAX = 5.0


class PathProber:
    """``interface.PathProbes``.

    Args:
        kept: file for the next process of this node, on tmpfs.
        remeasured: has all overlays follow what is known now; may raise SkepError, and is called again then.
        rng: from 0 to 1, spreads rounds.
    """

    def __init__(
        self,
        data_path: DataPath,
        ports: PortChecks,
        kept: Path,
        remeasured: Callable[[], Awaitable[None]],
        clock: Clock,
        rng: Callable[[], float],
    ) -> None:
        self._data_path = data_path
        self._ports = ports
        self._file = kept
        self._kept: Kept | None = None
        self._keeping = asyncio.Lock()
        self._remeasured = remeasured
        self._clock = clock
        self._rng = rng
        self._targets: ProbeTargets | None = None
        self._has_targets = False
        self._changed = asyncio.Event()
        self._tasks: dict[NodeId, tuple[PathPeer, asyncio.Task[None]]] = {}
        self._guests: dict[NodeId, tuple[PathPeer, float]] = {}
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._reports: dict[NodeId, PathReport] = {}
        self._news: dict[NodeId, PathReport] = {}
        self._has_news = asyncio.Event()
        self._acted_on: tuple[Measured, Offload] | None = None
        self._is_measured = asyncio.Event()

    # --- asked by the agent -----------------------------------------------------------------------------------

    def set_targets(self, targets: ProbeTargets | None) -> None:
        """Probe these from now on, new ones at once; the latest targets wins.  None: nobody, and leave nothing."""
        self._targets, self._has_targets = sound(targets) if targets is not None else None, True
        self._changed.set()

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        """The latest of each peer."""
        return dict(self._reports)

    def latest(self) -> Mapping[NodeId, PathReport]:
        """``reports``, as a call."""
        return self.reports

    async def next_reports(self) -> tuple[PathReport, ...]:
        """Wait for verdicts that changed or settled, or another MTU; the latest of each peer concerned."""
        await self._has_news.wait()
        self._has_news.clear()
        news, self._news = self._news, {}
        return tuple(news.values())

    async def examine(self, peers: Iterable[PathPeer], *, throughput: bool = False) -> tuple[PathReport, ...]:
        """Probe these now; those that took longer than ``EXAMINATION_S`` are not in the answer."""
        if self._targets is None:
            return ()
        asked = ProbeTargets(node=self._targets.node, peers=tuple(peers))
        chosen = {peer.node_id: peer for peer in sound(asked).peers}
        until = self._clock.monotonic() + _GUEST_S
        self._guests |= {id: (peer, until) for id, peer in chosen.items()}
        found: dict[NodeId, PathReport] = {}

        async def look(peer: PathPeer) -> None:
            async with self._limit:
                found[peer.node_id] = await self._round(peer, None, is_thorough=True)

        try:
            async with asyncio.timeout(EXAMINATION_S):
                await self._settle()
                async with asyncio.TaskGroup() as group:
                    for peer in chosen.values():
                        group.create_task(look(peer), name=f"examination of {peer.node_id}")
                for peer in chosen.values() if throughput else ():
                    per_s = await self._data_path.throughput(peer)
                    found[peer.node_id] = msgspec.structs.replace(found[peer.node_id], throughput=per_s)
        except TimeoutError:
            log.warning("examination cut short", asked=len(chosen), answered=len(found))
        return tuple(found[id] for id in chosen if id in found)

    def warnings(self) -> tuple[str, ...]:
        """Of what was put right and has a price, for ``docker info``."""
        if not self._data_path.offload.is_off:
            return ()
        return (
            "the network card computes wrong checksums inside VXLAN: checksum offload is switched off on overlays",
        )

    # --- keeping ----------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Go on where an earlier process of this node ended, unless it has targets already."""
        self._kept = await asyncio.to_thread(load, self._file)
        if self._kept is not None and not self._has_targets:
            self._data_path.measured = self._kept.measured
            self.set_targets(self._kept.wish)

    async def run(self) -> None:
        """Probe until cancelled; what is in the kernel then stays for the next process."""
        try:
            async with asyncio.TaskGroup() as group:
                keep = partial(retry, clock=self._clock, rng=self._rng)
                keeping = keep(self._keep_overlays, "overlays do not follow what was measured")
                group.create_task(keeping, name="measured overlays")
                await keep(partial(self._keep_namespace, group), "probes have failed")
        finally:
            self._data_path.close()

    async def _keep_namespace(self, group: asyncio.TaskGroup) -> None:
        backoff = Backoff(0.2, _RETRY_S_MAX, rng=self._rng)
        while True:
            self._changed.clear()
            now = self._clock.monotonic()
            self._guests = {id: guest for id, guest in self._guests.items() if guest[1] > now}
            is_settled = await self._settle()
            self._keep_peers(group)
            await self._keep()
            if is_settled:
                backoff.reset()
                # The device under it may have another MTU by then.
                await is_set_within(self._changed, PERIOD_S)
            else:
                await backoff.sleep(self._clock)

    async def _keep(self) -> None:
        if not self._has_targets:
            return
        async with self._keeping:
            kept = Kept(self._targets, self._data_path.measured) if self._targets is not None else None
            try:
                if kept != self._kept or kept is None:
                    await asyncio.to_thread(save, self._file, kept)
                    self._kept = kept
            except OSError as error:
                log.warning("measurements not kept", reason=str(error))

    async def _settle(self) -> bool:
        if not self._has_targets:
            return True
        targets = self._targets
        if targets is not None:
            known = {peer.node_id for peer in targets.peers} | {targets.node.node_id}
            guests = [peer for id, (peer, _) in sorted(self._guests.items()) if id not in known]
            targets = msgspec.structs.replace(targets, peers=(*targets.peers, *guests)[: 2 * PEERS_MAX])
        before = self._data_path.failure
        failure = await self._data_path.settle(targets)
        if failure and failure != before:
            log.warning("data path cannot be probed, trying again", reason=failure)
        if failure:
            return False
        self._follow()
        return True

    def _keep_peers(self, group: asyncio.TaskGroup) -> None:
        wanted = {peer.node_id: peer for peer in self._targets.peers} if self._targets is not None else {}
        for id, (peer, task) in tuple(self._tasks.items()):
            if wanted.get(id) != peer or task.done():
                task.cancel()
                del self._tasks[id]
            if id not in wanted:
                self._reports.pop(id, None)
                self._news.pop(id, None)
        for id, peer in wanted.items():
            if id not in self._tasks:
                asking = retry(
                    partial(self._keep_asking, peer),
                    "probes have failed",
                    clock=self._clock,
                    rng=self._rng,
                    peer=id,
                )
                task = group.create_task(asking, name=f"probes of {id}")
                self._tasks[id] = (peer, task)

    async def _keep_asking(self, peer: PathPeer) -> None:
        while True:
            async with self._limit:
                before = self._reports.get(peer.node_id)
                report = await self._round(peer, before, is_thorough=False)
            self._reports[peer.node_id] = report
            if is_news(before, report):
                self._news[peer.node_id] = report
                self._has_news.set()
                _say(peer, report)
            pause = pause_s(len(self._tasks), self._rng(), is_settled=report.is_settled)
            await self._clock.sleep(pause)

    async def _round(self, peer: PathPeer, before: PathReport | None, *, is_thorough: bool) -> PathReport:
        async with asyncio.TaskGroup() as group:
            inside = group.create_task(self._data_path.findings(peer, is_thorough=is_thorough))
            outside = group.create_task(self._ports.findings(self._targets, peer))
        self._follow()
        mtu = self._data_path.measured.own.get(peer.node_id, 0)
        return reported(peer, (*outside.result(), *inside.result()), mtu, before)

    # --- what follows -----------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Overlays follow what is known by now, if that is something else."""
        if (self._data_path.measured, self._data_path.offload) != self._acted_on:
            self._is_measured.set()

    async def _keep_overlays(self) -> None:
        backoff = Backoff(0.2, _RETRY_S_MAX, rng=self._rng)
        while True:
            await self._is_measured.wait()
            self._is_measured.clear()
            known = self._data_path.measured, self._data_path.offload
            await self._keep()
            try:
                await self._remeasured()
            except (SkepError, OSError) as error:
                log.warning("overlays do not follow what was measured yet", reason=str(error))
                self._is_measured.set()
                await backoff.sleep(self._clock)
            else:
                self._acted_on = known
                backoff.reset()


def _say(peer: PathPeer, report: PathReport) -> None:
    """To this node's log, once it is settled."""
    for one in report.failing if report.is_settled else ():
        log.warning("path fails", peer=peer.hostname, check=one.check.value, port=one.port, why=one.detail)
