"""Finds the task that a user names to reach its container: by a service, one of its slots, or a task."""

import re
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from skep.aio.time_slices import STEP, SlicedWork
from skep.errors import FailedPrecondition, NotFound
from skep.manager.control.tasks import known_status
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.encoding import ApiObject
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.stacks import stack_of
from skep.store.interface import View

_CONTAINER_ID: Final = re.compile(r"[0-9a-f]{12,64}")
"""A container's id, at least as many characters of it as ``docker ps`` shows.  Shorter ones may be a name."""


class TaskTarget(ApiObject):
    """A task as ``GET /skep/tasks/{word}/target`` shows it."""

    task_id: TaskId = msgspec.field(name="TaskID", default=TaskId(""))
    service_id: ServiceId = msgspec.field(name="ServiceID", default=ServiceId(""))
    node_id: NodeId = msgspec.field(name="NodeID", default=NodeId(""))
    name: str = ""
    """``web.1``, or ``web.m2`` for a global service."""
    hostname: str = ""
    """Host name of the task's node."""
    state: str = ""
    """``unknown`` if its node is down."""
    stack: str = ""
    """Stack of its service, or empty without one."""

    @classmethod
    def of(cls, view: View, task: Task) -> "TaskTarget":
        """Return the representation of ``task``."""
        service, node = view.lookup(Service, task.service_id), view.lookup(Node, task.node_id)
        hostname = node.description.hostname if node is not None else ""
        owner = service.spec.name if service is not None else task.service_id
        return cls(
            task_id=task.id,
            service_id=task.service_id,
            node_id=task.node_id,
            name=f"{owner}.{task.place(hostname or task.node_id)}",
            hostname=hostname,
            state=known_status(view, task).state.value,
            stack=stack_of(service.spec.labels) if service is not None else "",
        )


Among = Callable[[Service | Task], bool]
"""Returns whether a service or task takes part (``View.resolve``)."""


def target_of(view: View, word: str, among: Among | None = None) -> SlicedWork[Task]:
    """Return the task that ``word`` names.  Pauses between tasks, because a container's id may belong to any of them.

    ``word`` is a task's id or a prefix of it, ``SERVICE``, ``SERVICE.SLOT``, ``SERVICE.NODE`` for a global service, the
    name of a task's container (``SERVICE.SLOT.TASK``), or the container's id as docker shows it.  For a service or
    slot, the result is the running task with the lowest slot, and the newest of several.

    Raises:
        NotFound: The service or task does not exist.
        FailedPrecondition: The service, slot or task has no running task.
        InvalidArgument: The word is ambiguous.
    """
    if (task := _by_id(view, word, among)) is not None:
        return task
    service, slot = _service_and_slot(view, word, among)
    if service is None:
        try:
            return _by_prefix(view, word, among)
        except NotFound as error:
            task = yield from _by_container(view, word, among)
            if task is not None:
                return task
            raise NotFound(
                f"no such service or task: {word} (skep service ls; skep service ps SERVICE)"
            ) from error
    tasks = yield from _selected(
        view.find(Task, service_id=service.id), lambda task: not slot or _is_at(view, task, slot)
    )
    running = yield from _selected(
        tasks, lambda task: task.status.state is TaskState.RUNNING and task.is_wanted
    )
    if not running:
        if not tasks and slot:
            raise FailedPrecondition(f"service {service.spec.name} has no task {slot}")
        raise FailedPrecondition(
            f"{word} has no running task{_states(tasks)}: see skep explain {service.spec.name}"
        )
    return min(running, key=lambda task: (task.slot, task.node_id, -task.version.index))


def task_named(view: View, word: str, among: Among | None = None) -> Task:
    """Return the task that ``word`` names, in any state.

    ``word`` is the same as in ``target_of``, but for a slot the result is the wanted or newest task.

    Raises:
        NotFound: The service or task does not exist.
        InvalidArgument: The word is ambiguous.
    """
    if (task := _by_id(view, word, among)) is not None:
        return task
    service, slot = _service_and_slot(view, word, among)
    if service is None or not slot:
        return _by_prefix(view, word, among)
    tasks = [task for task in view.find(Task, service_id=service.id) if _is_at(view, task, slot)]
    if not tasks:
        return _by_prefix(view, word, among)
    return max(tasks, key=lambda task: (task.is_wanted, task.created_at, task.id))


def _by_id(view: View, id: str, among: Among | None) -> Task | None:
    task = view.lookup(Task, TaskId(id))
    return task if task is not None and (among is None or among(task)) else None


def _by_prefix(view: View, word: str, among: Among | None) -> Task:
    """Return the task with the id prefix ``word``, or the task of the container with the name ``word``.

    A container's name must end with the whole task id.  If a prefix sufficed, a mistyped ``wbe.2`` would mean any task
    whose id begins with 2, and ``skep exec`` would run there.  Raises: NotFound; InvalidArgument: several tasks have
    the prefix.
    """
    name, _, id = word.rpartition(".")
    if not name:
        return view.resolve(Task, word, among)
    if (task := _by_id(view, id, among)) is not None:
        return task
    raise NotFound(f"task {word} not found")


def _by_container(view: View, word: str, among: Among | None) -> SlicedWork[Task | None]:
    """Return the task whose container has the id or the short id ``word``, or None if no or several tasks have it."""
    if not _CONTAINER_ID.fullmatch(word):
        return None

    def has_container(task: Task) -> bool:
        container = task.status.container_status
        return (
            container is not None
            and container.container_id.startswith(word)
            and (among is None or among(task))
        )

    found = yield from _selected(view.find(Task), has_container)
    return found[0] if len(found) == 1 else None


def _selected(tasks: Iterable[Task], is_selected: Callable[[Task], bool]) -> SlicedWork[list[Task]]:
    selected = []
    for number, task in enumerate(tasks, 1):
        if is_selected(task):
            selected.append(task)
        if number % STEP == 0:
            yield
    return selected


def _service_and_slot(view: View, word: str, among: Among | None) -> tuple[Service | None, str]:
    """Return the service at the start of ``word`` and the text after its name, or None if it names no service."""
    name, _, slot = word.partition(".")
    for candidate, rest in ((word, ""), (name, slot)):
        try:
            return view.resolve(Service, candidate, among), rest
        except NotFound:
            continue
    return None, ""


def _is_at(view: View, task: Task, slot: str) -> bool:
    """Return whether ``slot`` names the task: its number, or its node's name or id, each optionally with
    the task's id.
    """
    if task.slot:
        places = {str(task.shown_slot)}
    else:
        node = view.lookup(Node, task.node_id)
        places = {task.node_id, node.description.hostname if node is not None else ""}
    return slot in places or slot.removesuffix(f".{task.id}") in places


def _states(tasks: Iterable[Task]) -> str:
    states = sorted({task.status.state.value for task in tasks if task.is_wanted})
    return f" (it is {', '.join(states)})" if states else ""
