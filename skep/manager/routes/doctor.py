"""``/skep/doctor/network``: runs every node's probes now, and returns the results."""

import msgspec
from aiohttp import web

from skep.api.server import JsonLines, Routes, flag
from skep.manager.routes.access import current_view, manager_of
from skep.model.conditions import network_conditions
from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId
from skep.model.node import Node
from skep.model.paths import DiagnosticsResult, PathFinding, PathReport
from skep.model.planes import is_docker_node
from skep.store.interface import View

routes = Routes()


class ExaminedNode(ApiObject):
    """A node of ours, of which there will be a line: its answer, or why there is none."""

    id: NodeId
    hostname: str = always("")


class Beginning(ApiObject):
    """The first line of the answer: who is asked."""

    nodes: tuple[ExaminedNode, ...] = always(())


class Finding(ApiObject):
    """One check, from the node that answers to a peer."""

    check: str
    port: str = always("")
    sent: int = always(0)
    lost: int = always(0)
    failing: bool = always(False)
    round_trip_ms: float | None = None
    detail: str = ""


class Path(ApiObject):
    """What a node found of one peer.  ``mtu``: bytes of the underlay; ``throughput``: bytes per second; 0: unknown."""

    peer_id: NodeId
    peer: str = always("")
    findings: tuple[Finding, ...] = always(())
    mtu: int = msgspec.field(default=0, name="MTU")
    throughput: int = 0


class Answer(ApiObject):
    """Every further line: one node's answer.  ``error``: why it is none, or not whole.

    ``conditions``: what the node says is wrong with its network.
    """

    id: NodeId
    hostname: str = always("")
    paths: tuple[Path, ...] = always(())
    error: str = ""
    conditions: tuple[str, ...] = ()


@routes.get("/skep/doctor/network")
async def examine_network(request: web.Request) -> web.StreamResponse:
    """One JSON object per line: who is asked, then each node's answer as it comes, within 25 s.

    ``throughput``: measured, too, which moves up to 32 MiB between each two nodes.
    """
    view = await current_view(request)
    throughput = flag(request, "throughput")
    async with JsonLines(request) as lines:
        ours = [node.id for node in view.find(Node) if not is_docker_node(node)]
        await lines.send(
            Beginning(nodes=tuple(ExaminedNode(id=id, hostname=_hostname(view, id)) for id in ours))
        )

        async def tell(examined: DiagnosticsResult) -> None:
            await lines.send(answer_of(view, examined))

        try:
            await manager_of(request).diagnostics.run_all(tell, throughput=throughput)
        except* ConnectionResetError:
            pass  # the user has seen enough
    return lines.response


def answer_of(view: View, examined: DiagnosticsResult) -> Answer:
    """What a node found, with names."""
    return Answer(
        id=examined.node_id,
        hostname=_hostname(view, examined.node_id),
        paths=tuple(_path(view, report) for report in examined.reports),
        error=examined.error,
        conditions=_conditions(view, examined.node_id),
    )


def _conditions(view: View, id: NodeId) -> tuple[str, ...]:
    node = view.lookup(Node, id)
    return network_conditions(node.description) if node is not None else ()


def _path(view: View, report: PathReport) -> Path:
    return Path(
        peer_id=report.peer,
        peer=_hostname(view, report.peer),
        findings=tuple(map(_finding, report.findings)),
        mtu=report.mtu,
        throughput=report.throughput,
    )


def _finding(finding: PathFinding) -> Finding:
    return Finding(
        check=finding.check.value,
        port=finding.port,
        sent=finding.sent,
        lost=finding.lost,
        failing=finding.is_failing,
        round_trip_ms=finding.round_trip_ms,
        detail=finding.detail,
    )


def _hostname(view: View, id: NodeId) -> str:
    node = view.lookup(Node, id)
    return node.description.hostname if node is not None and node.description.hostname else id
