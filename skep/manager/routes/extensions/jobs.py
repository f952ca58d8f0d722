"""Jobs with their schedules and their runs: ``/skep/jobs``, ``/skep/services/{id}/run``, ``/retry`` and ``/runs``.

A run has ended tasks with exit codes and last lines.  All are Skep extensions.
"""

import asyncio
from collections import deque

from aiohttp import web
from msgspec.structs import replace

from skep.api.errors import Untranslated
from skep.api.http.server import Routes, json_list_response, json_response
from skep.errors import InvalidArgument, SkepError
from skep.manager.cluster import node_name
from skep.manager.control import jobs as control
from skep.manager.diagnosis.explanations import summary
from skep.manager.diagnosis.reasons import CauseKind, failure_of
from skep.manager.diagnosis.service_health import status_with_health
from skep.manager.logbroker.selection import KEPT, KEPT_HEAD
from skep.manager.routes.access import ManagerApi, current_view, manager_of
from skep.manager.routes.logs import closing
from skep.manager.services.job_listing import Job, schedule_words, shown_job
from skep.manager.services.job_runs import COMPLETED, RUNNING, past_starts
from skep.model.logs import LogQuery
from skep.model.node import Node
from skep.model.options.schedules import JOB_MODES
from skep.model.service import HealthState, JobStart, Service
from skep.model.task import Task, TaskState, state_age
from skep.model.task_end import TaskEnd
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp
from skep.store.interface import View

routes = Routes()

_PIECE = 50
"""Number of jobs between two pauses for the event loop."""

RUNS_MAX = 500
"""Maximum number of runs in one response, the latest ones."""
LINES_MAX = 100
"""Largest number of last lines of one run that a request may ask for."""
DEFAULT_LINES = 3
"""Default number of last lines of each task's output."""
LINE_BYTES_MAX = 4096
"""Longest line in the response, in bytes."""
LOGS_SECONDS_MAX = 10.0
"""Seconds to wait for the nodes' logs."""


@routes.get("/skep/jobs")
async def list_jobs(request: web.Request) -> web.StreamResponse:
    """List every job with its last and next run, in order of id."""
    view = await current_view(request)
    ids = [service.id for service in view.find(Service) if service.spec.mode.name in JOB_MODES]
    jobs: list[Job] = []
    for number, id in enumerate(ids):
        service = view.lookup(Service, id)
        if service is not None and service.removed_at is None:
            jobs.append(await _with_reason(manager_of(request), view, service, shown_job(view, service)))
        if number % _PIECE == _PIECE - 1:
            await asyncio.sleep(0)
            view = manager_of(request).store.view()
    return json_list_response(jobs)


async def _with_reason(manager: ManagerApi, view: View, service: Service, job: Job) -> Job:
    """Add to the note why tasks of the current run do not run, or on which nodes a completed one has not run."""
    is_global = service.spec.mode.global_job is not None
    if job.state != RUNNING and not (is_global and job.state == COMPLETED):
        return job
    status = await status_with_health(view, service, manager.clock.now_ns(), manager.clock)
    wanted = HealthState.DEGRADED if job.state == RUNNING else HealthState.HEALTHY
    if status.health is None or status.health.state is not wanted:
        return job
    return replace(job, note="; ".join(filter(None, (job.note, status.health.reason))))


@routes.post("/skep/services/{id}/run")
async def run_job(request: web.Request) -> web.StreamResponse:
    """Start the next run of a job now.  With ``replace``, even while the current run is active."""
    manager = manager_of(request)
    word = request.query.get("replace", "false")
    if word not in ("true", "false"):
        raise InvalidArgument(f"invalid replace {word!r}: expected true or false")
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    changed = await manager.update(control.run_job, service.id, now=manager.now(), replaces=word == "true")
    return json_response(shown_job(manager.store.view(), changed))


@routes.post("/skep/services/{id}/retry")
async def retry_job(request: web.Request) -> web.StreamResponse:
    """Retry the failed slots of a job's current run."""
    manager = manager_of(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    changed = await manager.update(control.retry_job, service.id)
    return json_response(shown_job(manager.store.view(), changed))


class TaskRun(ApiObject):
    """One ended task.  ``lines`` are the last lines of both streams, cut to 4096 bytes each."""

    task_id: TaskId
    slot: int = always(0)
    node_id: NodeId = NodeId("")
    node_name: str = ""
    """Host name of the node, also if it was removed."""
    job_iteration: Version | None = None
    created_at: Timestamp = Timestamp("")
    ended_at: Timestamp = Timestamp("")
    state: TaskState = always(TaskState.COMPLETE)
    exit_code: int | None = None
    err: str = ""
    end: TaskEnd | None = None
    """Reason why the task ended, without its lines, which are in ``lines``."""
    lines: tuple[str, ...] = always(())


class Runs(ApiObject):
    """Response of ``GET /skep/services/{id}/runs?tail=N``, oldest first.

    ``incomplete``: reason why some lines may be missing, or empty.
    """

    runs: tuple[TaskRun, ...] = always(())
    schedule: str = ""
    """Schedule of a job, as a sentence."""
    starts: tuple[JobStart, ...] = ()
    """Starts of a scheduled job, with reasons and skipped due times, the oldest first."""
    incomplete: str = ""


@routes.get("/skep/services/{id}/runs")
async def list_runs(request: web.Request) -> web.StreamResponse:
    """List the ended tasks of a service that are kept as history."""
    tail = _tail(request.query.get("tail", str(DEFAULT_LINES)))
    view = await current_view(request)
    service = view.resolve(Service, request.match_info["id"])
    tasks = [task for task in view.find(Task, service_id=service.id) if task.status.state.is_terminal]
    tasks = sorted(tasks, key=state_age)[-RUNS_MAX:]
    starts = past_starts(view, service)
    lines: dict[TaskId, deque[str]] = {task.id: deque(maxlen=tail) for task in tasks}
    incomplete = await _collect(request, lines, tail) if tail and tasks else ""
    return json_response(
        Runs(
            runs=tuple(_run(view, task, tuple(lines[task.id])) for task in tasks),
            schedule=schedule_words(service),
            starts=starts,
            incomplete=incomplete,
        )
    )


def _tail(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word) <= LINES_MAX):
        raise InvalidArgument(f"invalid tail {word!r}: expected a number of lines up to {LINES_MAX}")
    return int(word)


async def _collect(request: web.Request, lines: dict[TaskId, deque[str]], tail: int) -> str:
    """Fill ``lines`` from the nodes.  Returns which lines are missing, as a sentence."""
    query = LogQuery(tasks=tuple(lines), tail=tail)
    try:
        async with (
            asyncio.timeout(LOGS_SECONDS_MAX),
            closing(manager_of(request).logs.subscribe(query)) as entries,
        ):
            async for entry in entries:
                kept = lines.get(entry.task_id)
                if kept is not None and entry.attrs.get(KEPT) != KEPT_HEAD:
                    kept.append(entry.data[:LINE_BYTES_MAX].decode(errors="replace").rstrip("\r\n"))
    except TimeoutError:
        return f"not all nodes have responded within {LOGS_SECONDS_MAX:g} s"
    except (SkepError, Untranslated) as error:
        return str(error)
    return ""


def _run(view: View, task: Task, lines: tuple[str, ...]) -> TaskRun:
    status = task.status
    kind, words = failure_of(task)
    err = words if kind is CauseKind.UNHEALTHY else status.err
    if status.state in (TaskState.SHUTDOWN, TaskState.ORPHANED) and task.stop_cause is not None:
        err = summary(task, view.lookup(Node, task.node_id))
    container = status.container_status
    has_code = container is not None and container.container_id and status.state is not TaskState.REJECTED
    return TaskRun(
        task_id=task.id,
        slot=task.shown_slot,
        node_id=task.node_id,
        node_name=node_name(view, task.node_id),
        job_iteration=task.job_iteration,
        created_at=task.created_at,
        ended_at=status.timestamp,
        state=status.state,
        exit_code=container.exit_code if has_code and container is not None else None,
        err=err,
        end=replace(status.end, lines=()) if status.end is not None else None,
        lines=lines,
    )
