"""Probes without a network.  A test sets their results."""

import asyncio
from collections.abc import Mapping

from skep.model.networks.paths import (
    SETTLED_ROUNDS,
    DiagnosticsRequest,
    PathCheck,
    PathFinding,
    PathPeer,
    PathReport,
    ProbeTargets,
)
from skep.model.values.ids import NodeId


def a_finding(
    check: PathCheck = PathCheck.OVERLAY, port: str = "4789/udp", *, fails: bool = False
) -> PathFinding:
    return PathFinding(
        check=check,
        port=port,
        sent=3,
        lost=3 if fails else 0,
        round_trip_ms=None if fails else 0.5,
        detail="nothing came back" if fails else "",
    )


def a_report(peer: str, *findings: PathFinding, rounds: int = SETTLED_ROUNDS) -> PathReport:
    return PathReport(peer=NodeId(peer), findings=findings or (a_finding(),), rounds=rounds)


class ScriptedProbes:
    """Implements ``agent.session.probe_stream.ProbeSource``."""

    def __init__(self) -> None:
        self.requests: list[ProbeTargets | None] = []
        self.diagnosed: list[DiagnosticsRequest] = []
        self.answers: tuple[PathReport, ...] = ()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._reports: dict[NodeId, PathReport] = {}
        self._changed_event: asyncio.Queue[PathReport] = asyncio.Queue()

    def say(self, *reports: PathReport) -> None:
        for report in reports:
            self._reports[report.peer] = report
            self._changed_event.put_nowait(report)

    @property
    def peers(self) -> set[str]:
        """Return the peers in the last targets."""
        last = self.requests[-1] if self.requests else None
        return {peer.node_id for peer in last.peers} if last is not None else set()

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        return self._reports

    def set_targets(self, requested: ProbeTargets | None) -> None:
        self.requests.append(requested)

    async def next_reports(self) -> tuple[PathReport, ...]:
        return (await self._changed_event.get(),)

    async def diagnose(self, own: PathPeer | None, request: DiagnosticsRequest) -> tuple[PathReport, ...]:
        self.diagnosed.append(request)
        await self.may_answer.wait()
        return self.answers
