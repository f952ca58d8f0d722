"""The probes of one node: schedules them, keeps the latest report of each peer, and passes measurements on.

Each peer has a task that probes it every ten seconds, and at once if it is new.  Measurements are sent to the managers
(in reports), to the other nodes (in probe responses), and to this node's overlays, which use the MTU and the setting of
checksum offload.
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
from skep.aio.race import is_set_within, wait_first
from skep.dataplane.plan.probe import PEERS_MAX, sound
from skep.dataplane.probe.data_path import DataPath
from skep.dataplane.probe.findings import is_changed, next_report
from skep.dataplane.probe.measurements import Measurements, Offload
from skep.dataplane.probe.port_probe import PortChecks
from skep.errors import SkepError
from skep.linux.files import is_no_file, replace_file
from skep.model.networks.paths import PathPeer, PathReport, ProbeTargets
from skep.model.values.ids import NodeId

PERIOD_S = 10.0
"""Seconds between probes of a path that works."""
RECHECK_S = 4.0
"""Seconds between probes after a verdict that may be due to random loss."""
URGENT_S = 2.0
"""Seconds between probes while no manager answers.

Then only probes tell which peers have failed, and each node chooses its backends by them.
"""
PEERS_AT_FULL_RATE = 64
"""Peers up to which each is probed once in a period.  With more, the period grows, so that the rate stays the same."""


def pause_s(peers: int, random: float, *, is_settled: bool, is_urgent: bool = False) -> float:
    """Return the seconds until a peer is probed again, if there are ``peers`` of them.

    Spread at random by a quarter to each side.

    ``random`` is from 0 to 1.
    """
    period = URGENT_S if is_urgent else PERIOD_S if is_settled else RECHECK_S
    return period * max(1.0, peers / PEERS_AT_FULL_RATE) * (0.75 + 0.5 * random)


log = structlog.get_logger()

DIAGNOSTICS_S = 15.0
"""Time limit in seconds for probes that a person waits for."""
AT_ONCE = 16
"""Limit for the peers that are probed at the same time."""
_TEMPORARY_S = 2 * DIAGNOSTICS_S
"""Seconds for which peers are probed that only a person's request has named."""
_RETRY_S_MAX = 5.0
"""Longest pause in seconds after an error of the probe namespace."""


class SavedState(msgspec.Struct, frozen=True):
    """State for the next process of this node: the last targets and the measurements.

    It is kept on tmpfs, because a reboot may bring another network card.  Without it, a node process that restarts,
    perhaps while no manager is reachable, would not respond to probes, and overlays would use the devices' MTU until
    everything was measured again.
    """

    targets: ProbeTargets
    measured: Measurements


def load_state(file: Path) -> SavedState | None:
    """Return the saved state, or None if the file is missing or damaged.  Damage is logged, and all is measured again.

    Raises: OSError: the file cannot be read at present.
    """
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=SavedState)
    except OSError as error:
        if not is_no_file(error):
            raise
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("measurements cannot be read", file=str(file), reason=str(error))
        return None


def save_state(file: Path, state: SavedState | None) -> None:
    """Save ``state``, or remove the file if None.  Raises: OSError."""
    if state is None:
        file.unlink(missing_ok=True)
    else:
        replace_file(file, msgspec.msgpack.encode(state), is_durable=False)


class PathProber:
    """Probes the targets and reports changes.

    Args:
        file: File on tmpfs with the state for the next process of this node.
        apply_measurements: Applies the present measurements to all overlays.  It may raise SkepError and is then
            retried.
        rng: Returns numbers from 0 to 1, which spread rounds.
        on_targets: Called whenever targets are set, also with the targets of an earlier process.
    """

    def __init__(
        self,
        data_path: DataPath,
        ports: PortChecks,
        file: Path,
        apply_measurements: Callable[[], Awaitable[None]],
        clock: Clock,
        rng: Callable[[], float],
        on_targets: Callable[[ProbeTargets | None], None] = lambda _: None,
    ) -> None:
        self._on_targets = on_targets
        self._data_path = data_path
        self._ports = ports
        self._file = file
        self._saved: SavedState | None = None
        self._is_unread = False
        self._saving = asyncio.Lock()
        self._apply_measurements = apply_measurements
        self._clock = clock
        self._rng = rng
        self._targets: ProbeTargets | None = None
        self._has_targets = False
        self._changed = asyncio.Event()
        self._is_urgent = False
        self._urgency = asyncio.Event()
        """Set when probes become urgent, and then replaced by a new event."""
        self._tasks: dict[NodeId, tuple[PathPeer, asyncio.Task[None]]] = {}
        self._temporary: dict[NodeId, tuple[PathPeer, float]] = {}
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._reports: dict[NodeId, PathReport] = {}
        self._changed_reports: dict[NodeId, PathReport] = {}
        self._has_changed_reports = asyncio.Event()
        self._acted_on: tuple[Measurements, Offload] | None = None
        self._is_measured = asyncio.Event()

    # --- used by the agent -----------------------------------------------------------------------------------

    def set_targets(self, targets: ProbeTargets | None) -> None:
        """Probe these targets from now on, new ones at once.  With None, stop probing and remove the namespace."""
        self._targets, self._has_targets = sound(targets) if targets is not None else None, True
        self._on_targets(self._targets)
        self._changed.set()

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        """The latest report of each peer."""
        return dict(self._reports)

    async def next_reports(self) -> tuple[PathReport, ...]:
        """Wait until a verdict has changed or settled or an MTU has changed.

        Return the latest report of each such peer.

        For one caller at a time.  A slow caller misses only reports that newer ones have replaced.
        """
        await self._has_changed_reports.wait()
        self._has_changed_reports.clear()
        reports, self._changed_reports = self._changed_reports, {}
        return tuple(reports.values())

    async def diagnose(
        self, peers: Iterable[PathPeer], *, throughput: bool = False
    ) -> tuple[PathReport, ...]:
        """Probe these peers now.  Meanwhile they get responses as if they were targets.

        Peers that took longer than ``DIAGNOSTICS_S`` are left out.  With ``throughput``, the throughput to one peer
        after the other is measured then, with at most 32 MiB and 1 s for each.
        """
        if self._targets is None:
            return ()
        request = ProbeTargets(node=self._targets.node, peers=tuple(peers))
        chosen = {peer.node_id: peer for peer in sound(request).peers}
        until = self._clock.monotonic() + _TEMPORARY_S
        self._temporary |= {id: (peer, until) for id, peer in chosen.items()}
        found: dict[NodeId, PathReport] = {}

        async def probe(peer: PathPeer) -> None:
            async with self._limit:
                found[peer.node_id] = await self._round(peer, None, is_thorough=True)

        try:
            async with asyncio.timeout(DIAGNOSTICS_S):
                await self._apply_targets()
                async with asyncio.TaskGroup() as group:
                    for peer in chosen.values():
                        group.create_task(probe(peer), name=f"diagnostics of {peer.node_id}")
                for peer in chosen.values() if throughput else ():
                    per_s = await self._data_path.throughput(peer)
                    found[peer.node_id] = msgspec.structs.replace(found[peer.node_id], throughput=per_s)
        except TimeoutError:
            log.warning("diagnostics cut short", requested=len(chosen), measured=len(found))
        return tuple(found[id] for id in chosen if id in found)

    def warnings(self) -> tuple[str, ...]:
        """Return warnings for ``docker info`` about active workarounds that cost performance."""
        if not self._data_path.offload.is_off:
            return ()
        return (
            "the network card computes wrong checksums inside VXLAN: checksum offload is switched off on overlays",
        )

    def set_urgent(self, is_urgent: bool) -> None:
        """Probe all peers now and every ``URGENT_S``, or return to the usual rate."""
        if is_urgent and not self._is_urgent:
            self._urgency.set()
            self._urgency = asyncio.Event()
        self._is_urgent = is_urgent

    # --- probing ----------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Start with the state of an earlier process.  If it cannot be read at present, ``run`` reads it later."""
        try:
            await self._restore()
        except OSError:
            self._is_unread = True

    async def _restore(self) -> None:
        saved = await asyncio.to_thread(load_state, self._file)
        if saved is not None and not self._has_targets:
            self._saved = saved
            self._data_path.measured = saved.measured
            self.set_targets(saved.targets)

    async def run(self) -> None:
        """Probe until cancelled.  The kernel's state stays for the next process."""
        try:
            async with asyncio.TaskGroup() as group:
                keep = partial(retry, clock=self._clock, rng=self._rng)
                if self._is_unread:
                    group.create_task(keep(self._restore, "measurements not read yet"), name="measurements")
                updating = keep(self._update_overlays, "overlays not updated with measurements")
                group.create_task(updating, name="overlays with measurements")
                await keep(partial(self._run_namespace, group), "probes have failed")
        finally:
            self._data_path.close()

    async def _run_namespace(self, group: asyncio.TaskGroup) -> None:
        backoff = Backoff(0.2, _RETRY_S_MAX, rng=self._rng)
        while True:
            self._changed.clear()
            now = self._clock.monotonic()
            self._temporary = {id: entry for id, entry in self._temporary.items() if entry[1] > now}
            is_applied = await self._apply_targets()
            self._start_and_stop_peers(group)
            await self._save()
            if is_applied:
                backoff.reset()
                # The underlying device may have another MTU by then.
                await is_set_within(self._changed, PERIOD_S)
            else:
                await backoff.sleep(self._clock)

    async def _save(self) -> None:
        if not self._has_targets:
            return
        async with self._saving:
            state = SavedState(self._targets, self._data_path.measured) if self._targets is not None else None
            try:
                if state != self._saved or state is None:
                    await asyncio.to_thread(save_state, self._file, state)
                    self._saved = state
            except OSError as error:
                log.warning("measurements not saved", reason=str(error))

    async def _apply_targets(self) -> bool:
        if not self._has_targets:
            return True
        targets = self._targets
        if targets is not None:
            known = {peer.node_id for peer in targets.peers} | {targets.node.node_id}
            temporary = [peer for id, (peer, _) in sorted(self._temporary.items()) if id not in known]
            targets = msgspec.structs.replace(targets, peers=(*targets.peers, *temporary)[: 2 * PEERS_MAX])
        before = self._data_path.failure
        failure = await self._data_path.apply(targets)
        if failure and failure != before:
            log.warning("data path cannot be probed, retrying", reason=failure)
        if failure:
            return False
        self._notify_overlays()
        return True

    def _start_and_stop_peers(self, group: asyncio.TaskGroup) -> None:
        wanted = {peer.node_id: peer for peer in self._targets.peers} if self._targets is not None else {}
        for id, (peer, task) in tuple(self._tasks.items()):
            if wanted.get(id) != peer or task.done():
                task.cancel()
                del self._tasks[id]
            if id not in wanted:
                self._reports.pop(id, None)
                self._changed_reports.pop(id, None)
        for id, peer in wanted.items():
            if id not in self._tasks:
                probing = retry(
                    partial(self._probe_peer, peer),
                    "probes have failed",
                    clock=self._clock,
                    rng=self._rng,
                    peer=id,
                )
                task = group.create_task(probing, name=f"probes of {id}")
                self._tasks[id] = (peer, task)

    async def _probe_peer(self, peer: PathPeer) -> None:
        while True:
            urgency = self._urgency
            async with self._limit:
                before = self._reports.get(peer.node_id)
                report = await self._round(peer, before, is_thorough=False)
            self._reports[peer.node_id] = report
            if is_changed(before, report):
                self._changed_reports[peer.node_id] = report
                self._has_changed_reports.set()
                _log_failures(peer, report)
            pause = pause_s(
                len(self._tasks), self._rng(), is_settled=report.is_settled, is_urgent=self._is_urgent
            )
            await wait_first(self._clock.sleep(pause), urgency.wait())

    async def _round(self, peer: PathPeer, before: PathReport | None, *, is_thorough: bool) -> PathReport:
        async with asyncio.TaskGroup() as group:
            inside = group.create_task(self._data_path.findings(peer, is_thorough=is_thorough))
            outside = group.create_task(self._ports.findings(self._targets, peer))
        self._notify_overlays()
        mtu = self._data_path.measured.own.get(peer.node_id, 0)
        return next_report(peer, (*outside.result(), *inside.result()), mtu, before)

    # --- overlays -----------------------------------------------------------------------------------------

    def _notify_overlays(self) -> None:
        """Request an update of the overlays if measurements have changed."""
        if (self._data_path.measured, self._data_path.offload) != self._acted_on:
            self._is_measured.set()

    async def _update_overlays(self) -> None:
        backoff = Backoff(0.2, _RETRY_S_MAX, rng=self._rng)
        while True:
            await self._is_measured.wait()
            self._is_measured.clear()
            known = self._data_path.measured, self._data_path.offload
            await self._save()
            try:
                await self._apply_measurements()
            except (SkepError, OSError) as error:
                log.warning("overlays not updated with measurements", reason=str(error))
                self._is_measured.set()
                await backoff.sleep(self._clock)
            else:
                self._acted_on = known
                backoff.reset()


def _log_failures(peer: PathPeer, report: PathReport) -> None:
    """Log failing checks once the verdict is settled."""
    for one in report.failing if report.is_settled else ():
        log.warning("path fails", peer=peer.hostname, check=one.check.value, port=one.port, reason=one.detail)
