"""``/skep/doctor/network``: runs every node's probes now and returns the results.

``/skep/verify`` checks the invariants of the stored state, or with ``last`` returns what the leader has found.
"""

import asyncio

import msgspec
from aiohttp import web

from skep.api.http.server import JsonLines, Routes, flag, json_response
from skep.errors import InvalidArgument, ResourceExhausted
from skep.manager.probes.nat import NatPlan, members_of
from skep.manager.routes.access import current_view, manager_of, plan_slot
from skep.manager.verify.loop import InvariantCheck
from skep.manager.verify.records import recorded, shown
from skep.model.networks.data_planes import is_docker_node
from skep.model.networks.paths import DiagnosticsResult, PathFinding, PathReport
from skep.model.node import Node
from skep.model.node_reports.conditions import network_conditions
from skep.model.node_reports.rootless import is_rootless_node
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId
from skep.store.interface import View

routes = Routes()

_VERIFIED_WITHIN_S = 75.0
"""Timeout in seconds, from the moment when the request gets its slot.  Four looks are ten seconds apart."""


class ProbedNode(ApiObject):
    """A Skep node.  A line with its result, or the reason of its absence, follows."""

    id: NodeId
    hostname: str = always("")


class Beginning(ApiObject):
    """The first line of the response: all nodes that take part."""

    nodes: tuple[ProbedNode, ...] = always(())


class Finding(ApiObject):
    """One check, from the reporting node to a peer."""

    check: str
    port: str = always("")
    sent: int = always(0)
    lost: int = always(0)
    failing: bool = always(False)
    round_trip_ms: float | None = None
    detail: str = ""


class Path(ApiObject):
    """A node's findings about one peer.  ``mtu`` is the underlay's, ``throughput`` is in bytes per second.  0 if
    unknown.  ``way`` is ``direct``, ``tunnel``, ``relay HOSTNAME``, or ``none`` for nodes behind NAT without a tunnel.
    """

    peer_id: NodeId
    peer: str = always("")
    findings: tuple[Finding, ...] = always(())
    mtu: int = msgspec.field(default=0, name="MTU")
    throughput: int = 0
    way: str = always("direct")


class NodeResult(ApiObject):
    """Any further line: one node's result.

    ``error`` tells why it is missing or incomplete.  ``conditions`` are network problems that the node reports.
    A rootless node has no paths, because it takes part in no overlay network.
    """

    id: NodeId
    hostname: str = always("")
    paths: tuple[Path, ...] = always(())
    error: str = ""
    conditions: tuple[str, ...] = ()
    rootless: bool = False


@routes.get("/skep/doctor/network")
async def diagnose_network(request: web.Request) -> web.StreamResponse:
    """Send one JSON object per line: the nodes, then each node's result as it arrives, within 25 s."""
    if flag(request, "throughput"):
        raise InvalidArgument("measure throughput with POST: it loads every link, which a viewer may not do")
    return await _run(request, throughput=False)


@routes.post("/skep/doctor/network")
async def measure_throughput(request: web.Request) -> web.StreamResponse:
    """Run the diagnostics and measure throughput, which transfers up to 32 MiB between each pair of nodes.

    One test runs at a time, with a pause after it.
    """
    manager_of(request).diagnostics.require_throughput()
    return await _run(request, throughput=True)


async def _run(request: web.Request, *, throughput: bool) -> web.StreamResponse:
    view = await current_view(request)
    plan = NatPlan(members_of(view.find(Node)))
    async with JsonLines(request) as lines:
        ours = [node.id for node in view.find(Node) if not is_docker_node(node)]
        await lines.send(
            Beginning(nodes=tuple(ProbedNode(id=id, hostname=_hostname(view, id)) for id in ours))
        )

        async def send_result(result: DiagnosticsResult) -> None:
            await lines.send(node_result(view, result, plan))

        try:
            await manager_of(request).diagnostics.run_all(send_result, throughput=throughput)
        except* ConnectionResetError:
            pass  # the client closed the connection
    return lines.response


def node_result(view: View, result: DiagnosticsResult, plan: NatPlan) -> NodeResult:
    """Return a node's diagnostics with the host names of the nodes in them, and the ways by which it reaches them."""
    return NodeResult(
        id=result.node_id,
        hostname=_hostname(view, result.node_id),
        paths=tuple(_path(view, report, plan.way(result.node_id, report.peer)) for report in result.reports),
        error=result.error,
        conditions=_conditions(view, result.node_id),
        rootless=(node := view.lookup(Node, result.node_id)) is not None and is_rootless_node(node),
    )


def _conditions(view: View, id: NodeId) -> tuple[str, ...]:
    node = view.lookup(Node, id)
    return network_conditions(node.description) if node is not None else ()


def _path(view: View, report: PathReport, way: str) -> Path:
    return Path(
        peer_id=report.peer,
        peer=_hostname(view, report.peer),
        findings=tuple(map(_finding, report.findings)),
        mtu=report.mtu,
        throughput=report.throughput,
        way=way or "direct",
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


@routes.get("/skep/verify")
async def verify(request: web.Request) -> web.StreamResponse:
    """Check the state, and again some seconds later if something is violated.

    Raises:
        ResourceExhausted: Too many checks wait, or this one takes too long.
    """
    view = await current_view(request)
    if flag(request, "last"):
        return json_response(recorded(view))
    manager = manager_of(request)
    async with plan_slot(request):
        began = manager.clock.monotonic()
        try:
            async with asyncio.timeout(_VERIFIED_WITHIN_S):
                found = shown(await InvariantCheck(manager.store.view, manager.clock).run())
        except TimeoutError as error:
            raise ResourceExhausted(
                f"the check takes more than {_VERIFIED_WITHIN_S:g} s: try again later"
            ) from error
    seconds = round(manager.clock.monotonic() - began, 1)
    return json_response(msgspec.structs.replace(found, seconds=seconds))
