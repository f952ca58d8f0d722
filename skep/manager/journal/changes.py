"""The journal entries for a change of an object in the store.  Pure.

Every manager derives the same entries from the same commits, and the leader writes them (``loop``).  Only changes that
matter later become entries.  For a task, these are its start, its end and the replacement of another task, but not its
other states.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from skep.manager.cluster import node_name
from skep.manager.diagnosis.reasons import failure_of
from skep.manager.eviction.steps import EVICTION_ID, Eviction, decoded_eviction
from skep.manager.failover.records import ADDRESSES_ID, holder_changes
from skep.manager.services.freezes import freeze_changes
from skep.manager.services.job_listing import stop_of
from skep.manager.services.job_runs import FAILED, of_present_run, restarts_in
from skep.model.container import ContainerSpec
from skep.model.history import JournalEntry, Severity, masked_text
from skep.model.network import Network
from skep.model.node import Availability, Node, NodeRole, NodeState, Reachability
from skep.model.node_reports.conditions import disk_pressure
from skep.model.options.labels import is_stopped
from skep.model.options.schedules import without_stop
from skep.model.secret import Config, Secret
from skep.model.service import Service, ServiceSpec, UpdateState
from skep.model.swarm import Swarm
from skep.model.task import StopCause, Task, TaskState
from skep.model.task_end import words_of
from skep.model.values.stacks import stack_of
from skep.model.values.times import unix_ns
from skep.model.volume import Volume
from skep.store.interface import Created, Deleted, Event, Updated, View
from skep.store.kinds import Payload

WATCHED = (Service, Task, Node, Secret, Config, Network, Volume, Swarm, Payload)
"""Kinds of objects whose changes may become entries."""

_ENDS = {
    TaskState.COMPLETE: ("complete", Severity.INFO),
    TaskState.SHUTDOWN: ("stop", Severity.INFO),
    TaskState.FAILED: ("fail", Severity.ERROR),
    TaskState.REJECTED: ("reject", Severity.ERROR),
    TaskState.ORPHANED: ("lost", Severity.ERROR),
}
_UPDATES = {
    UpdateState.UPDATING: ("update-started", Severity.INFO, "update started"),
    UpdateState.PAUSED: ("update-paused", Severity.ERROR, "update paused"),
    UpdateState.COMPLETED: ("update-completed", Severity.INFO, "update completed"),
    UpdateState.ROLLBACK_STARTED: ("rollback-started", Severity.WARNING, "rollback started"),
    UpdateState.ROLLBACK_PAUSED: ("rollback-paused", Severity.ERROR, "rollback paused"),
    UpdateState.ROLLBACK_COMPLETED: ("rollback-completed", Severity.WARNING, "rollback completed"),
}


def entries_of(event: Event, view: View) -> Iterator[JournalEntry]:
    """Yield the entries about one object's change, without id, time and revision.

    Args:
        view: A view of this revision or a later one, for names.
    """
    match event:
        case Created(Task() as task):
            yield from _created_task(task, view)
        case Updated(Task() as old, Task() as new):
            yield from _changed_task(old, new, view)
        case Created(Service() as service):
            yield _service(service, "create", f"service {service.spec.name} created: {_summary(service)}")
        case Updated(Service() as old, Service() as new):
            yield from _changed_service(old, new, view)
        case Created(Node() as node) if node.description.hostname:
            yield _joined(node)
        case Updated(Node() as old, Node() as new):
            yield from _changed_node(old, new)
        case Deleted(Node() as node):
            yield _node(node, "remove", f"node {_hostname(node)} was removed", Severity.WARNING)
        case Updated(Swarm() as old, Swarm() as new):
            yield from _changed_swarm(old, new)
        case Created(Payload() as payload) | Updated(_, Payload() as payload) if payload.id == EVICTION_ID:
            before = event.old if isinstance(event, Updated) else None
            yield from _eviction(before, payload)
        case Created(Payload() as payload) | Updated(_, Payload() as payload) if payload.id == ADDRESSES_ID:
            yield from _addresses(event.old if isinstance(event, Updated) else None, payload, view)
        case Created(Secret() | Config() | Network() | Volume() as object):
            yield _object(object, "create")
        case Deleted(Secret() | Config() | Network() | Volume() as object):
            yield _object(object, "remove")
        case Updated(Secret() | Config() | Network() | Volume() as old, object) if _spec(old) != _spec(
            object
        ):
            yield _object(object, "update")


# -- tasks -----------------------------------------------------------------------------------------------------------


def _created_task(task: Task, view: View) -> Iterator[JournalEntry]:
    """Yield the entry of a task that replaces an earlier one, with the reason.

    The first task of a slot has an entry when it starts.
    """
    if not task.service_id:
        return
    slot = f"{task.service_id}/{task.slot or task.node_id}"
    earlier = [one for one in view.find(Task, slot=slot) if one.created_at < task.created_at]
    if task.job_iteration is not None:
        earlier = [one for one in earlier if one.job_iteration == task.job_iteration]
    if not earlier:
        return
    last = max(earlier, key=lambda one: (one.created_at, one.id))
    why, severity = replacement_reason(last, task, view)
    entry = _task(task, "replace", view, severity)
    yield replace(entry, message=f"task {entry.name} ({last.id}) is replaced: {why}")


def replacement_reason(last: Task, successor: Task, view: View) -> tuple[str, Severity]:
    """Return why ``successor`` replaces ``last``: the first of these reasons that holds in the store."""
    state, node = last.status.state, view.lookup(Node, last.node_id)
    # After a rollback, tasks of an earlier version stay if they match the service's spec.
    is_other = last.spec_version != successor.spec_version
    if is_other and last.spec != successor.spec:
        before, after = _image(last), _image(successor)
        image = f": image {before} → {after}" if before != after else ""
        return f"its service was updated{image}", Severity.INFO
    name = node_name(view, last.node_id)
    is_down = node is not None and node.status.state is NodeState.DOWN
    if (cause := last.stop_cause) is not None and not is_down:
        is_loss = cause in (StopCause.NODE_DOWN, StopCause.NODE_REMOVED)
        return cause.words(name), Severity.WARNING if is_loss else Severity.INFO
    if state in (TaskState.FAILED, TaskState.REJECTED):
        was = "was " if state is TaskState.REJECTED else ""
        return f"it {was}{state.value}: {end_of(last)}", Severity.WARNING
    if state is TaskState.COMPLETE:
        return "its process ended with code 0", Severity.INFO
    if last.preemption is not None:
        return f"it was {last.preemption.words}", Severity.WARNING
    if last.node_id and node is None:
        return "its node was removed", Severity.WARNING
    if node is not None:
        if node.status.state is NodeState.DOWN:
            because = f": {node.status.message}" if node.status.message else ""
            return f"its node {name} is down{because}", Severity.WARNING
        if node.spec.availability is Availability.DRAIN:
            return f"its node {name} is drained", Severity.INFO
        if state is TaskState.ORPHANED:
            return f"its node {name} does not have it", Severity.WARNING
        if is_other:
            return "its service was updated", Severity.INFO
        return f"it no longer fits its node {name}, or was stopped", Severity.INFO
    return "it had no node yet", Severity.INFO


def end_of(task: Task) -> str:
    """Return how a task ended, in the words of ``skep explain``."""
    if task.has_failed or task.status.state is TaskState.FAILED:
        return failure_of(task)[1]
    end = task.status.end
    words = filter(None, (masked_text(task.status.err), words_of(end) if end is not None else ""))
    return "; ".join(dict.fromkeys(words)) or "no reason given"


def _changed_task(old: Task, new: Task, view: View) -> Iterator[JournalEntry]:
    state = new.status.state
    if old.status.state is state:
        if _is_given_up(new) and not _is_given_up(old):
            entry = _task(new, "give-up", view, Severity.WARNING)
            why = StopCause.NODE_DOWN.words(node_name(view, new.node_id))
            yield replace(entry, message=f"task {entry.name} is not restarted, by its restart policy: {why}")
    elif state is TaskState.RUNNING:
        entry = _task(new, "start", view)
        yield replace(entry, message=f"task {entry.name} runs on {entry.node or entry.node_id}")
    elif state in _ENDS:
        action, severity = _ENDS[state]
        entry = _task(new, action, view, severity)
        words = {"stop": "was stopped", "complete": "completed", "lost": "was lost"}.get(action)
        failed = "was rejected" if action == "reject" else state.value
        how = words or f"{failed}: {end_of(new)}"
        if action == "stop" and new.preemption is not None:
            how = f"{how}: {new.preemption.words}"
        elif action in ("stop", "lost"):
            why = new.stop_cause.words(node_name(view, new.node_id)) if new.stop_cause is not None else ""
            ended = end_of(new) if new.status.end is not None and action == "stop" else ""
            how = ": ".join(filter(None, (f"{how}, because {why}" if why else how, ended)))
        where = f" on {entry.node}" if entry.node else ""
        yield replace(entry, message=f"task {entry.name}{where} {how}")


def _is_given_up(task: Task) -> bool:
    """Return whether a service's task is lost with its node and has no successor.  The node does not report its end."""
    is_unreported = task.stop_cause is StopCause.NODE_DOWN and not task.status.state.is_terminal
    return is_unreported and task.was_stopped_for_good and task.job_iteration is None


def _task(task: Task, action: str, view: View, severity: Severity = Severity.INFO) -> JournalEntry:
    service = view.lookup(Service, task.service_id)
    owner = service.spec.name if service is not None else ""
    node = node_name(view, task.node_id) if task.node_id else ""
    is_known = node != task.node_id or view.lookup(Node, task.node_id) is not None
    return JournalEntry(
        type="task",
        action=action,
        severity=severity,
        object_id=task.id,
        task_id=task.id,
        name=".".join(filter(None, (owner, task.place(node)))),
        service_id=task.service_id,
        service=owner,
        stack=stack_of(service.spec.labels) if service is not None else "",
        node_id=task.node_id,
        node=node if is_known else "",
    )


def _image(task: Task) -> str:
    container = task.spec.container_spec
    return container.image.partition("@")[0] if container is not None else ""


# -- services --------------------------------------------------------------------------------------------------------


def _changed_service(old: Service, new: Service, view: View) -> Iterator[JournalEntry]:
    name = new.spec.name
    if new.removed_at is not None:
        if old.removed_at is None:
            yield _service(new, "remove", f"service {name} was removed", Severity.WARNING)
        return
    if old.spec != new.spec:
        changes = "; ".join(spec_changes(old.spec, new.spec)) or "its spec was rewritten without changes"
        scaled = new.autoscaled
        if scaled is not None and scaled != old.autoscaled:
            yield _service(new, "autoscale", f"service {name} autoscaled: {changes} ({scaled.reason})")
        else:
            yield _service(new, "update", f"service {name} updated: {changes}")
    if old.autoscaling_problem != new.autoscaling_problem:
        problem = new.autoscaling_problem
        words = f"autoscaling of service {name} lacks measures: {masked_text(problem)}"
        if problem:
            yield _service(new, "autoscale", words, Severity.WARNING)
        else:
            yield _service(new, "autoscale", f"autoscaling of service {name} has all its measures again")
    yield from _changed_job(old, new, view)
    before = old.update_status.state if old.update_status is not None else None
    status = new.update_status
    if status is None or status.state is None or status.state is before:
        return
    action, severity, words = _UPDATES[status.state]
    message = status.message if status.message not in ("", "update in progress", words) else ""
    details = f": {masked_text(message)}" if message else ""
    what, _, became = words.partition(" ")
    yield _service(new, action, f"{what} of service {name} {became}{details}", severity)


def _changed_job(old: Service, new: Service, view: View) -> Iterator[JournalEntry]:
    """Yield the entry of a run that starts without an update, or fails, or of a due time that is skipped."""
    before, after, name = old.job_status, new.job_status, new.spec.name
    if before is None or after is None or before == after:
        return
    starts = after.schedule.starts if after.schedule is not None else ()
    known = before.schedule.starts if before.schedule is not None else ()
    last = starts[-1] if starts and (not known or starts[-1].at != known[-1].at) else None
    if last is not None and last.skipped:
        message = f"job {name} was not run at {last.scheduled_at}: {last.skipped}"
        yield _service(new, "skip", message, Severity.WARNING)
    elif last is not None:
        why = f"it was due at {last.scheduled_at}" if last.scheduled_at is not None else "on request"
        late = f", and earlier ones since {last.missed_since}" if last.missed_since is not None else ""
        yield _service(new, "run", f"run {after.job_iteration.index} of job {name} began: {why}{late}")
    elif before.job_iteration != after.job_iteration and old.spec == new.spec:
        yield _service(new, "run", f"run {after.job_iteration.index} of job {name} began: on request")
    if after.present_outcome == FAILED and before.present_outcome != FAILED:
        message = f"run {after.job_iteration.index} of job {name} failed{_why_failed(new, view)}"
        yield _service(new, "fail", message, Severity.ERROR)
    if after.retried_until is not None and before.retried_until != after.retried_until:
        message = f"failed tasks of run {after.job_iteration.index} of job {name} are retried on request"
        yield _service(new, "retry", message)


def _why_failed(job: Service, view: View) -> str:
    """Return the last failure of the current run, and how often the task was restarted, or why it was stopped."""
    tasks = of_present_run(job, view.find(Task, service_id=job.id))
    failed = [one for one in tasks if one.ended_in_failure]
    last = max(failed, key=lambda one: (unix_ns(one.created_at), one.id), default=None)
    if last is None:
        why = stop_of(view, tasks)
        return f": {why}" if why else ""
    slot = [one for one in failed if _place(one) == _place(last)]
    return f" {restarts_in(slot)}: {end_of(last)}"


def _place(task: Task) -> int | str:
    return task.slot or task.node_id


def _service(service: Service, action: str, message: str, severity: Severity = Severity.INFO) -> JournalEntry:
    return JournalEntry(
        type="service",
        action=action,
        severity=severity,
        object_id=service.id,
        name=service.spec.name,
        service_id=service.id,
        service=service.spec.name,
        stack=stack_of(service.spec.labels),
        message=message,
    )


def _summary(service: Service) -> str:
    container = service.spec.task_template.container_spec
    image = container.image.partition("@")[0] if container is not None else ""
    mode = service.spec.mode.name
    count = f"{service.spec.replicas} × " if mode == "replicated" else ""
    return f"{count}{image}, {mode}"


# -- nodes -----------------------------------------------------------------------------------------------------------


def _changed_node(old: Node, new: Node) -> Iterator[JournalEntry]:
    name = _hostname(new)
    if new.description.hostname and not old.description.hostname:
        yield _joined(new)  # the node's name arrives with its first session
    elif old.status.state is not new.status.state:
        if new.status.state is NodeState.DOWN:
            because = f": {new.status.message}" if new.status.message else ""
            yield _node(new, "down", f"node {name} is down{because}", Severity.ERROR)
        elif new.status.state is NodeState.READY:
            yield _node(new, "up", f"node {name} is ready")
    if old.spec.availability is not new.spec.availability:
        words = {Availability.DRAIN: "drain", Availability.PAUSE: "pause", Availability.ACTIVE: "activate"}
        before, after = old.spec.availability.value, new.spec.availability.value
        action = words[new.spec.availability]
        yield _node(new, action, f"availability of node {name}: {before} → {after}")
    if old.spec.role is not new.spec.role:
        is_promotion = new.spec.role is NodeRole.MANAGER
        action, rank = ("promote", "manager") if is_promotion else ("demote", "worker")
        yield _node(new, action, f"role of node {name} set to {rank}")
    if old.spec.labels != new.spec.labels:
        yield _node(new, "update", f"labels of node {name} changed")
    if new.cut_off and old.cut_off != new.cut_off:
        why = "; ".join(one.summary for one in new.cut_off)
        yield _node(new, "cut-off", f"node {name} gets no tasks on networks: {why}", Severity.ERROR)
    before, now = disk_pressure(old.description), disk_pressure(new.description)
    if now and not before:
        yield _node(new, "disk-full", f"node {name}: {now}", Severity.ERROR)
    elif before and not now:
        yield _node(new, "disk-free", f"the disk of node {name} has space again")
    yield from _changed_manager(old, new, name)


def _changed_manager(old: Node, new: Node, name: str) -> Iterator[JournalEntry]:
    before, after = old.manager_status, new.manager_status
    if after is None:
        return
    if after.leader and not (before is not None and before.leader):
        yield _node(new, "leader", f"manager {name} became the leader", Severity.WARNING)
    if before is None or before.reachability is after.reachability:
        return
    if after.reachability is Reachability.UNREACHABLE:
        yield _node(new, "unreachable", f"manager {name} is unreachable", Severity.ERROR)
    elif before.reachability is Reachability.UNREACHABLE:
        yield _node(new, "reachable", f"manager {name} is reachable again")


def _joined(node: Node) -> JournalEntry:
    return _node(node, "create", f"node {_hostname(node)} joined as a {node.spec.role.value}")


def _node(node: Node, action: str, message: str, severity: Severity = Severity.INFO) -> JournalEntry:
    return JournalEntry(
        type="node",
        action=action,
        severity=severity,
        object_id=node.id,
        name=_hostname(node),
        node_id=node.id,
        node=_hostname(node),
        message=message,
    )


def _hostname(node: Node) -> str:
    return node.shown_name


# -- the cluster -----------------------------------------------------------------------------------------------------


def _changed_swarm(old: Swarm, new: Swarm) -> Iterator[JournalEntry]:
    if old.spec != new.spec:
        parts = [
            name for name in new.spec.__struct_fields__ if getattr(old.spec, name) != getattr(new.spec, name)
        ]
        yield _cluster(new, "update", f"cluster settings changed: {', '.join(parts)}")
    for role in ("worker", "manager"):
        if getattr(old.join_tokens, role) != getattr(new.join_tokens, role):
            yield _cluster(new, "rotate", f"join token of {role}s rotated")
    if new.root_rotation_in_progress != old.root_rotation_in_progress:
        words = "began" if new.root_rotation_in_progress else "ended"
        yield _cluster(new, "rotate", f"rotation of the cluster's root certificate {words}")
    if new.freeze is not None and old.freeze is None:
        nodes = len(new.freeze.nodes)
        message = f"tasks of lost nodes are not replaced: {nodes} nodes went down at once"
        yield _cluster(new, "suspend", message, Severity.ERROR)
    elif new.freeze is None and old.freeze is not None:
        yield _cluster(new, "resume", "tasks of lost nodes are replaced again")
    for action, facts in freeze_changes(old, new):
        yield _cluster(new, action, facts["message"])


def _cluster(swarm: Swarm, action: str, message: str, severity: Severity = Severity.INFO) -> JournalEntry:
    return JournalEntry(type="cluster", action=action, severity=severity, object_id=swarm.id, message=message)


def _eviction(before: Any, payload: Payload) -> Iterator[JournalEntry]:
    """Yield an entry when the eviction begins and when it is complete.  ``skep node evict`` shows its steps."""
    eviction = decoded_eviction(payload)
    earlier: Eviction | None = decoded_eviction(before) if before is not None else None
    is_new = earlier is None or (earlier.nodes, earlier.asked_at) != (eviction.nodes, eviction.asked_at)
    if is_new:
        message = f"eviction of node {eviction.hostname} requested by {eviction.asked_by}"
    elif eviction.next_step is None and earlier is not None and earlier.next_step is not None:
        message = f"node {eviction.hostname} was evicted: all its keys and certificates are replaced"
    else:
        return
    yield JournalEntry(
        type="node",
        action="evict",
        severity=Severity.WARNING,
        object_id=eviction.node_id,
        name=eviction.hostname,
        node_id=eviction.node_id,
        node=eviction.hostname,
        message=message,
    )


def _addresses(before: Any, payload: Payload, view: View) -> Iterator[JournalEntry]:
    """Yield an entry for each failover address that another node takes, or that no node has any longer."""
    for action, one, former, reason in holder_changes(before, payload):
        name = node_name(view, one.node_id or former)
        why = f": {reason}" if reason else ""
        left = f" from {node_name(view, former)}" if former and one.node_id else ""
        what = f"{name} takes failover address {one.address}{left}{why}"
        yield JournalEntry(
            type="cluster",
            action=f"{action}-address",
            severity=Severity.WARNING if reason else Severity.INFO,
            object_id=one.address,
            name=one.address,
            node_id=one.node_id or former,
            node=name,
            message=what if one.node_id else f"{name} gives up failover address {one.address}{why}",
        )


# -- other objects ---------------------------------------------------------------------------------------------------


def _object(object: Any, action: str) -> JournalEntry:
    kind = type(object).__name__.lower()
    words = {"create": "created", "remove": "removed", "update": "updated"}[action]
    name = object.spec.name
    return JournalEntry(
        type=kind,
        action=action,
        object_id=object.id,
        name=name,
        stack=stack_of(object.spec.labels),
        message=f"{kind} {name} {words}",
    )


def _spec(object: Any) -> Any:
    return object.spec


def folded(entries: Iterable[JournalEntry], alone_max: int = 20) -> list[JournalEntry]:
    """Return ``entries`` in order, with only the first few of equal actions on tasks of one service.

    A service that is scaled to thousands of tasks must not displace everything else from the history.  The last kept
    entry of a group represents the rest, whose number is its ``count``.
    """
    kept: list[JournalEntry] = []
    places: dict[tuple[str, ...], tuple[int, int]] = {}
    for entry in entries:
        if entry.type != "task" or not entry.service_id:
            kept.append(entry)
            continue
        group = (entry.service_id, entry.action)
        seen, place = places.get(group, (0, 0))
        if seen < alone_max:
            places[group] = seen + 1, len(kept)
            kept.append(entry)
        else:
            places[group] = seen + 1, place
            kept[place] = replace(kept[place], count=kept[place].count + 1, revision=entry.revision)
    for seen, place in places.values():
        if seen > alone_max:
            entry = kept[place]
            kept[place] = replace(
                entry, message=f"{entry.message}, and {entry.count - 1} more tasks of {entry.service}"
            )
    return kept


def folded_requests(entries: Iterable[JournalEntry]) -> list[JournalEntry]:
    """Return ``entries`` in order, with only the last of a client's equal requests with equal outcomes."""
    last: dict[tuple[object, ...], JournalEntry] = {}
    for entry in entries:
        key = (entry.method, entry.path, entry.status, entry.message, entry.by, entry.object_id)
        before = last.pop(key, None)
        last[key] = replace(entry, count=entry.count + before.count) if before is not None else entry
    return list(last.values())


_NAMES_MAX = 5
"""Names that one line lists."""
_NAMED = frozenset({"image", "env", "secrets", "configs", "labels"})


def spec_changes(old: ServiceSpec, new: ServiceSpec) -> Iterator[str]:
    """Yield one phrase per difference."""
    before, after = (one.task_template.container_spec or ContainerSpec() for one in (old, new))
    if before.image != after.image:
        yield f"image {_short(before.image, after.image)} → {_short(after.image, before.image)}"
    if old.mode.name != new.mode.name:
        yield f"mode {old.mode.name} → {new.mode.name}"
    elif old.mode.name == "replicated" and old.given_replicas != new.given_replicas:
        yield f"replicas {old.given_replicas} → {new.given_replicas}"
    if is_stopped(old.labels) != is_stopped(new.labels):
        yield "stopped" if is_stopped(new.labels) else "started"
    yield from _phrase("environment", _variables(before.env), _variables(after.env))
    yield from _phrase(
        "secrets", *({one.secret_name: one for one in each.secrets} for each in (before, after))
    )
    yield from _phrase(
        "configs", *({one.config_name: one for one in each.configs} for each in (before, after))
    )
    yield from _phrase("labels", *(without_stop(one.labels) for one in (old, new)))
    template = old.task_template, new.task_template
    if template[0].force_update != template[1].force_update:
        yield "all tasks will be replaced"
    others = [
        *_differing(before, after, _NAMED),
        *_differing(*template, {"container_spec", "force_update"}),
        *_differing(old, new, {"task_template", "mode", "labels"}),
    ]
    if others:
        yield f"changed: {', '.join(others)}"


def _short(image: str, other: str) -> str:
    """Return the image without its digest, unless only the digest differs."""
    name = image.partition("@")[0]
    return name if name != other.partition("@")[0] else image


def _variables(env: Iterable[str]) -> Mapping[str, Any]:
    return {name: value for name, _, value in (variable.partition("=") for variable in env)}


def _phrase(noun: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield a phrase such as ``environment +A -B ~C``, with added, removed and changed names."""
    marks = [f"+{name}" for name in after if name not in before]
    marks += [f"-{name}" for name in before if name not in after]
    marks += [f"~{name}" for name in after if name in before and before[name] != after[name]]
    if marks:
        more = f" and {len(marks) - _NAMES_MAX} more" if len(marks) > _NAMES_MAX else ""
        yield f"{noun} {' '.join(marks[:_NAMES_MAX])}{more}"


def _differing(old: Any, new: Any, said: Iterable[str]) -> list[str]:
    names = [name for name in old.__struct_fields__ if name not in said]
    return [name.replace("_", " ") for name in names if getattr(old, name) != getattr(new, name)]
