"""``/skep/tasks/{id}/explain`` and ``/skep/services/{id}/explain``: why an object is not in its desired state."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import partial

import msgspec
from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import result_in_slices
from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.http.server import Routes, json_response
from skep.manager.autoscaling.state import door_nodes
from skep.manager.cluster import node_name
from skep.manager.control.targets import task_named
from skep.manager.control.tasks import damage_of, is_up_to_date, known_status, with_damage
from skep.manager.diagnosis.departures import why_it_stays
from skep.manager.diagnosis.explanations import (
    ServiceExplanation,
    explain_task,
)
from skep.manager.diagnosis.reasons import CauseKind
from skep.manager.diagnosis.scaling_explanations import AutoscalingExplanation, explain_autoscaling
from skep.manager.diagnosis.service_health import explanation_of, service_status
from skep.manager.diagnosis.unmet_needs import has_full_network, more_addresses
from skep.manager.orchestrator.replacement.enforcement import overcommitted
from skep.manager.routes.access import current_view, manager_of
from skep.manager.routes.extensions.placement import accounting_of, names_for
from skep.manager.routes.representations import slot_in
from skep.manager.scheduler.explaining.explain import (
    NodeVerdict,
    ServiceNames,
    closest_node,
    explaining_priority,
    verdict,
    with_shown_names,
)
from skep.manager.scheduler.explaining.smallest_change import finding_smallest_change
from skep.manager.scheduler.nodes.requirements import paths_of, planes_of, requirements_of
from skep.manager.scheduler.returning import must_wait, volumes_elsewhere
from skep.manager.services.freezes import held_by, stack_of_service
from skep.manager.services.quotas import replicas_within_quota
from skep.manager.services.routes import doors_in, proxies_in, route_problems
from skep.model.needs import cluster_mounts, host_ports, sources_of
from skep.model.network import Network
from skep.model.node import Node
from skep.model.node_reports.node_refusals import NodeRefusal, node_refusals_in
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.dependencies import WAITS_FOR
from skep.model.service import UNDER_WAY, Service
from skep.model.task import Task, TaskState
from skep.model.values.counts import counted
from skep.model.values.ids import NodeId, ServiceId
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import as_run, spec_of

routes = Routes()


_HOLDERS_MAX = 3
"""Most services that are named as holders of ports.  A reason should fit a line."""


class _Verdicts(msgspec.Struct, frozen=True):
    """Results of the scheduler's filters for a task that waits for a node.

    If no node accepts it, ``priority`` explains how priorities affect it, ``closest`` names the node with most of the
    resources that it needs, ``holders`` the services with its host-mode ports, and ``change`` the smallest change that
    would let it run.
    """

    verdicts: Sequence[NodeVerdict] = ()
    priority: str = ""
    closest: str = ""
    holders: str = ""
    change: str = ""


@routes.get("/skep/tasks/{id}/explain")
async def explain_one_task(request: web.Request) -> web.StreamResponse:
    """Explain the state of a task.  For a task that waits for a node, the response has each node's refusals."""
    view = await current_view(request)
    task = task_named(view, request.match_info["id"])
    named = names_for(identity_of(request))
    is_pending = task.status.state is TaskState.PENDING
    found = await _read_verdicts(view, task, named) if is_pending else _Verdicts()
    verdicts, priority = list(found.verdicts), found.priority
    elsewhere = volumes_elsewhere(task, view)
    if elsewhere and must_wait(task, view) and not task.node_id:
        verdicts = [_with_home(one, *elsewhere[0]) for one in verdicts]
    task = with_damage(view, replace(task, status=known_status(view, task)))
    nodes = {node.id: node for node in view.find(Node)}
    slot, now_ns = slot_in(view, task), SystemClock().now_ns()
    explanation = explain_task(
        task, nodes.get(task.node_id), verdicts, slot, nodes, now_ns, spec_of(view, task)
    )
    service = view.lookup(Service, task.service_id)
    if service is not None and (node := nodes.get(task.node_id)) is not None:
        surplus = overcommitted(node, view.find(Task, node_id=node.id))
        held = held_by(view, stack_of_service(service))
        stays = why_it_stays(task, service, view.find(Task, service_id=service.id), nodes, surplus, held)
        explanation = replace(explanation, summary=stays or explanation.summary)
    if priority:
        explanation = replace(explanation, summary=f"{explanation.summary}; {priority}")
    explanation = replace(explanation, smallest_change=found.change or more_addresses(task))
    if task.node_id and elsewhere:
        summary = f"{explanation.summary}; earlier data: {elsewhere[0][1]}"
        explanation = replace(explanation, summary=summary)
    return json_response(explanation)


@routes.get("/skep/services/{id}/explain")
async def explain_one_service(request: web.Request) -> web.StreamResponse:
    """Explain why a service has fewer tasks than desired, and why its tasks failed."""
    view = await current_view(request)
    service = view.resolve(Service, request.match_info["id"])
    clock = SystemClock()
    explanation = await explanation_of(
        view,
        service,
        await service_status(view, service),
        clock.now_ns(),
        clock,
        is_new=lambda task: is_up_to_date(view, task),
    )
    tasks = view.find(Task, service_id=service.id)
    autoscaling = await _autoscaling(request, view, service, tasks)
    explanation = replace(explanation, autoscaling=autoscaling)
    waiting = next((one for one in tasks if one.is_wanted and one.status.state is TaskState.PENDING), None)
    if waiting is not None:
        explanation = _with_figures(
            explanation, await _read_verdicts(view, waiting, names_for(identity_of(request)))
        )
        explanation = _with_missing_volumes(explanation, waiting, view)
    problem = explanation.problem
    blocked = view.lookup(Task, problem.task_id) if problem is not None else None
    if problem is not None and blocked is not None and problem.kind == CauseKind.NOT_ALLOCATED.value:
        is_full = await has_full_network(blocked, view.find(Task), clock)
        kind = CauseKind.NO_ADDRESS.value if is_full else problem.kind
        change = more_addresses(blocked) if is_full else explanation.smallest_change
        explanation = replace(explanation, problem=replace(problem, kind=kind), smallest_change=change)
    can_see = partial(sees, identity_of(request))
    more = (
        held_words(view, service),
        damage_of(view, Service, service.id),
        *route_problems(view, service, can_see),
        *_cut_off(view, tasks),
    )
    new = (one for one in more if one and one not in explanation.summary)
    return json_response(replace(explanation, summary="; ".join((explanation.summary, *new))))


async def _autoscaling(
    request: web.Request, view: View, service: Service, tasks: Sequence[Task]
) -> AutoscalingExplanation | None:
    """Explain the number of an autoscaled service's tasks."""
    if AUTOSCALE not in service.spec.labels:
        return None
    doors = doors_in(view)
    return explain_autoscaling(
        as_run(view, service),
        tasks,
        await manager_of(request).collect_usages(),
        partial(replicas_within_quota, manager_of(request).store.view(), service),
        proxies=proxies_in(view, doors),
        doors={id: node_name(view, id) for id in door_nodes(view, doors)},
        frozen=held_by(view, stack_of_service(service)),
        now_ns=SystemClock().now_ns(),
    )


def held_words(view: View, service: Service) -> str:
    """Return why Skep does not change the service by itself now.

    Empty during an update: no freeze and no closed window holds it back, so they would seem to be its cause.
    """
    status = service.update_status
    is_updating = status is not None and status.state in UNDER_WAY
    return "" if is_updating else held_by(view, stack_of_service(service))


def _cut_off(view: View, tasks: Sequence[Task]) -> Iterator[str]:
    """Yield the nodes with running tasks whose networks fail between that node and others."""
    running = [task for task in tasks if task.is_wanted and task.status.state is TaskState.RUNNING]
    for id, number in Counter(task.node_id for task in running).items():
        node = view.lookup(Node, id)
        here = next(task for task in running if task.node_id == id)
        paths = paths_of(one.network for one in here.networks_attachments)
        for one in node.cut_off if node is not None else ():
            if one.check in paths:
                name = node_name(view, id)
                yield f"{counted(number, 'task')} on {name}, which is cut off on {one.networks}: {one.summary}"


def _with_figures(explanation: ServiceExplanation, found: _Verdicts) -> ServiceExplanation:
    """Add what other services have reserved if that is the reason, and how priorities affect the waiting task.

    Rows of the dashboard and of ``skep top`` have no such figures: they need a count of the cluster's tasks.
    """
    reason, summary = explanation.reason, explanation.summary
    if found.closest and NodeRefusal.RESOURCES in node_refusals_in(reason):
        reason = f"{reason}; {found.closest}"
        summary = summary.replace(explanation.reason, reason, 1)
    if found.holders and NodeRefusal.HOST_PORT in node_refusals_in(reason):
        reason = f"{reason}; {found.holders}"
        summary = summary.replace(explanation.reason, reason, 1)
    if found.priority:
        summary = f"{summary}; {found.priority}"
    return replace(explanation, reason=reason, summary=summary, smallest_change=found.change)


def _with_missing_volumes(explanation: ServiceExplanation, task: Task, view: View) -> ServiceExplanation:
    """Add the cluster volumes that the waiting ``task`` needs and the cluster does not have."""
    reason = explanation.reason
    if NodeRefusal.CLUSTER_VOLUMES not in node_refusals_in(reason):
        return explanation
    known = {source for volume in view.find(Volume) for source in sources_of(volume)}
    missing = [one.source for one in cluster_mounts(task.spec) if one.source not in known]
    if not missing:
        return explanation
    named = f"{reason}; the cluster has no volume {', '.join(missing)}"
    return replace(explanation, reason=named, summary=explanation.summary.replace(reason, named, 1))


def _with_home(one: NodeVerdict, home: NodeId, words: str) -> NodeVerdict:
    """Return ``one`` for a task that waits for the node ``home``, on which its volume is."""
    return one if one.node_id == home else replace(one, reasons=(*one.reasons, words))


async def _read_verdicts(view: View, task: Task, named: ServiceNames) -> _Verdicts:
    """Apply the scheduler's filters to ``task``, on all nodes or only on the node that it was created for."""
    own_spec = spec_of(view, task)
    accounting = await accounting_of(view)
    planes = planes_of(task, lambda network_id: view.lookup(Network, network_id))
    requirements = requirements_of(task, own_spec, planes, accounting.affinities.of(task.service_id))
    copies = accounting.copies(task.service_id)
    shown = with_shown_names(requirements, view, named)
    verdicts = [
        verdict(shown, account, copies[account.node.id])
        for account in accounting.accounts.values()
        if task.node_id in ("", account.node.id)
    ]
    if task.status.err.startswith(WAITS_FOR) or not all(one.reasons for one in verdicts):
        return _Verdicts(verdicts)
    work = explaining_priority(task, requirements, accounting, view, named)
    change = finding_smallest_change(requirements, accounting)
    return _Verdicts(
        verdicts,
        change="" if task.node_id else await result_in_slices(change, SystemClock()),
        priority=await result_in_slices(work, SystemClock()),
        closest="" if task.node_id else closest_node(requirements, accounting),
        holders=_port_holders(requirements.host_ports, task.service_id, view, named),
    )


def _port_holders(ports: Collection[tuple[str, int]], own: ServiceId, view: View, named: ServiceNames) -> str:
    """Return which other services have tasks with these host-mode ports, as a sentence, or an empty text."""
    found: dict[str, None] = {}
    for service in view.find(Service) if ports else ():
        held = sorted(set(host_ports(service.spec)) & set(ports))
        if (
            held
            and service.id != own
            and any(one.is_active and one.node_id for one in view.find(Task, service_id=service.id))
        ):
            found |= {f"{number}/{protocol} is in use by {named(service)}": None for protocol, number in held}
    return "; ".join(list(found)[:_HOLDERS_MAX])
