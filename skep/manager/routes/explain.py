"""``/skep/tasks/{id}/explain``, ``/skep/services/{id}/explain``: why an object is not in its desired state."""

import asyncio

from aiohttp import web
from msgspec.structs import replace

from skep.api.server import Routes, json_answer
from skep.manager.control.tasks import is_up_to_date
from skep.manager.explanations import explain_service, explain_task
from skep.manager.routes.access import current_view, manager_of
from skep.manager.routes.shown import damage_of, service_status, with_damage
from skep.manager.scheduler.accounting import Accounting
from skep.manager.scheduler.explain import NodeVerdict, reserve_for, verdict
from skep.manager.scheduler.requirements import planes_of, requirements_of
from skep.model.network import Network
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.store.interface import View
from skep.store.kinds import spec_of
from skep.store.updates import batched

routes = Routes()

_PIECE = 1_000
"""Objects counted before the event loop gets control."""


@routes.get("/skep/tasks/{id}/explain")
async def explain_one_task(request: web.Request) -> web.StreamResponse:
    """Why a task is where it is; for one that waits for a node, each node's refusals."""
    view = await current_view(request)
    task = view.resolve(Task, request.match_info["id"])
    verdicts = await _verdicts(view, task) if task.status.state is TaskState.PENDING else []
    task = with_damage(view, task)
    return json_answer(explain_task(task, view.lookup(Node, task.node_id), verdicts))


@routes.get("/skep/services/{id}/explain")
async def explain_one_service(request: web.Request) -> web.StreamResponse:
    """What keeps a service from its wanted number of tasks, and what its tasks failed of."""
    view = await current_view(request)
    service = view.resolve(Service, request.match_info["id"])
    status = await service_status(view, service)
    view = manager_of(request).store.view()
    tasks = [with_damage(view, task) for task in view.find(Task, service_id=service.id)]
    nodes = {node.id: node for node in view.find(Node)}
    explanation = explain_service(
        service,
        tasks,
        wanted=status.desired_tasks,
        nodes=nodes,
        is_new=lambda task: is_up_to_date(view, task),
    )
    damage = damage_of(view, Service, service.id)
    return json_answer(
        replace(explanation, summary=f"{explanation.summary}; {damage}") if damage else explanation
    )


async def _verdicts(view: View, task: Task) -> list[NodeVerdict]:
    """Each node's refusals of ``task``, or those of the one node that it was made for."""
    own_spec = spec_of(view, task)
    nodes, tasks = view.find(Node), view.find(Task)
    accounting = Accounting()
    for some_nodes in batched(nodes, _PIECE):
        for node in some_nodes:
            accounting.set_node(node)
        await asyncio.sleep(0)
    for some_tasks in batched(tasks, _PIECE):
        for one in some_tasks:
            reserve_for(accounting, one, spec_of(view, one))
        await asyncio.sleep(0)
    planes = planes_of(task, lambda network_id: view.lookup(Network, network_id))
    requirements = requirements_of(task, own_spec, planes)
    copies = accounting.copies(task.service_id)
    return [
        verdict(requirements, account, copies[account.node.id])
        for account in accounting.accounts.values()
        if task.node_id in ("", account.node.id)
    ]
