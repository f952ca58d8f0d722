"""``/tasks``: the tasks of services.

Source: moby 20.10, daemon/cluster/{tasks,filters}.go; swarmkit, manager/controlapi/task.go.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TypeAlias

from aiohttp import web

from skep.api.access.identity import identity_of
from skep.api.errors import Untranslated
from skep.api.http.server import Filters, Routes, json_list_response, json_response
from skep.manager.control.tasks import is_up_to_date
from skep.manager.control.validation.new_objects import visible_to
from skep.manager.control_loops.informer import batches_of
from skep.manager.routes.access import current_view, manager_of
from skep.manager.routes.representations import has_labels, shown_task
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.store.interface import View
from skep.store.transactions.updates import batched

routes = Routes()

Condition: TypeAlias = Callable[[View, Task], bool]

_PIECE = 2_000
"""Number of tasks filtered between two pauses for the event loop."""


@routes.get("/tasks")
async def list_tasks(request: web.Request) -> web.StreamResponse:
    """List the tasks that match the filters, in order of id."""
    filters = Filters.of(request)
    filters.refuse_unknown(
        "name", "id", "label", "service", "node", "desired-state", "_up-to-date", "runtime"
    )
    view = await current_view(request)
    among = visible_to(view, identity_of(request))
    pieces, conditions = _search(view, filters, manager_of(request).store.view, among)
    tasks: list[Task] = []
    for piece in pieces:
        tasks += [task for task in piece if all(holds(view, task) for holds in conditions)]
        await asyncio.sleep(0)  # lets the event loop handle other requests before the next piece
        view = manager_of(request).store.view()
    return json_list_response(tasks, partial(shown_task, view, manager_of(request).clock.now_ns()))


@routes.get("/tasks/{id}")
async def inspect_task(request: web.Request) -> web.StreamResponse:
    """Show one task."""
    view = await current_view(request)
    return json_response(
        shown_task(view, manager_of(request).clock.now_ns(), view.resolve(Task, request.match_info["id"]))
    )


def _search(
    view: View,
    filters: Filters,
    present: Callable[[], View],
    among: Callable[[Service | Task], bool] | None,
) -> tuple[Iterator[Sequence[Task]], Sequence[Condition]]:
    """Return the tasks to search, in pieces, and the conditions for each.  ``present`` returns the current view.

    A service that ``among`` does not accept counts as missing.

    Raises:
        NotFound, InvalidArgument: A filter names no service or node.
        Untranslated: A state is unknown.
    """
    services = {view.resolve(Service, word, among).id for word in filters["service"]}
    nodes = {view.resolve(Node, word).id for word in filters["node"]}
    states = {_state(word) for word in filters["desired-state"] if word}
    if services:
        found = batched([task for id in sorted(services) for task in view.find(Task, service_id=id)], _PIECE)
    elif nodes:
        found = batched([task for id in sorted(nodes) for task in view.find(Task, node_id=id)], _PIECE)
    else:
        found = batches_of(present, Task)
    conditions: Sequence[tuple[object, Condition]] = (
        (services, lambda _, task: task.service_id in services),
        (nodes, lambda _, task: task.node_id in nodes),
        (states, lambda _, task: _has_desired(task, states)),
        (filters["id"], lambda _, task: filters.matches_prefix("id", task.id)),
        (filters["name"], lambda view, task: filters.matches_prefix("name", _name(view, task))),
        (filters["label"], lambda view, task: has_labels(_service_labels(view, task), filters["label"])),
        (filters["runtime"], lambda _, task: filters.matches("runtime", _runtime(task))),
        (not filters["runtime"], lambda _, task: task.spec.network_attachment_spec is None),
        (filters["_up-to-date"], is_up_to_date),
    )
    return found, [condition for wanted, condition in conditions if wanted]


def _has_desired(task: Task, states: Collection[TaskState]) -> bool:
    """Return whether ``task`` matches a filter for desired states.

    The next task of a slot is prepared while the previous one runs.  If no node takes it, it also counts as desired to
    run, because nothing else shows that the update cannot be placed.
    """
    is_refused = task.desired_state is TaskState.READY and task.status.state is TaskState.PENDING
    return task.desired_state in states or (
        is_refused and bool(task.status.err) and TaskState.RUNNING in states
    )


def _state(word: str) -> TaskState:
    try:
        return TaskState(word.lower())
    except ValueError:
        raise Untranslated(f"Invalid desired-state filter: '{word}'") from None


def _name(view: View, task: Task) -> str:
    """Return the task's name, ``web.1.<id>``.  A global service's task has its node's id in the middle."""
    service = view.lookup(Service, task.service_id)
    return task.container_name(service.spec.name if service is not None else "")


def _service_labels(view: View, task: Task) -> dict[str, str]:
    service = view.lookup(Service, task.service_id)
    return dict(service.spec.labels) if service is not None else {}


def _runtime(task: Task) -> str:
    if task.spec.plugin_spec is not None:
        return "plugin"
    return "attachment" if task.spec.network_attachment_spec is not None else "container"
