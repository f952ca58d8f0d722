"""Finds settings of a created or updated service that cannot work, for the warnings in the response."""

from collections.abc import Collection, Iterator, Mapping

from skep.model.door.routes import label_class
from skep.model.needs import host_ports
from skep.model.node import Node
from skep.model.options.constraints import is_satisfied, parsed, unknown_key
from skep.model.options.label_suggestions import NODE_LABELS, PREFIX, suggested_label
from skep.model.options.labels import MIN_AVAILABLE, STOPPED, is_stopped, min_available
from skep.model.options.overlap import why_stop_first
from skep.model.options.schedules import JOB_MODES, schedule_of
from skep.model.permissions.field_rights import CONTAINER_LABELS, SERVICE_LABELS
from skep.model.service import MAX_ATTEMPTS_MAX, ServiceSpec, UpdateOrder

_PUBLISH = "skep.publish."
"""Start of labels with a port in their name.  Creating a service refuses unknown ones."""


def spec_warnings(spec: ServiceSpec, nodes: Collection[Node]) -> Iterator[str]:
    """Yield a warning for each setting that has no effect, or cannot work on the nodes of the cluster."""
    yield from stop_warnings(spec)
    yield from label_warnings(spec)
    yield from restart_warnings(spec)
    yield from budget_warnings(spec)
    yield from placement_warnings(spec, nodes)


def stop_warnings(spec: ServiceSpec) -> Iterator[str]:
    """Yield a warning if the service has no tasks because it is stopped.  Docker's commands would wait for them."""
    if not is_stopped(spec.labels):
        return
    if spec.mode.name in JOB_MODES:
        schedule = schedule_of(spec.labels)
        if schedule is None or not schedule.is_suspended:
            yield f"label {STOPPED} alone has no effect on a job: use skep service stop {spec.name}"
    else:
        yield f"the service is stopped: skep service start {spec.name} starts its tasks"


def restart_warnings(spec: ServiceSpec) -> Iterator[str]:
    """Yield a warning if the restart policy has a limit that counts as none."""
    policy = spec.task_template.restart_policy
    if policy is not None and policy.max_attempts and not policy.attempts_limit:
        yield (
            f"max attempts {policy.max_attempts} of the restart policy count as no limit: "
            f"at most {MAX_ATTEMPTS_MAX} restarts of a task are counted"
        )


def budget_warnings(spec: ServiceSpec) -> Iterator[str]:
    """Yield a warning for each part of a disruption budget that cannot be kept."""
    text, replicas = spec.labels.get(MIN_AVAILABLE, ""), spec.replicas
    if spec.mode.name != "replicated" or not replicas:
        return
    if text.isdecimal() and int(text) > replicas:
        yield f"label {MIN_AVAILABLE}={text} counts as {replicas}, because the service has no more tasks"
    if min_available(spec.labels, replicas) == replicas and (data := why_stop_first(spec)):
        yield (
            f"label {MIN_AVAILABLE} keeps all tasks, and they write to {data}: a drain leaves them on their node until "
            "you run skep node drain --now, and an update still stops one at a time"
        )


def label_warnings(spec: ServiceSpec) -> Iterator[str]:
    """Yield a warning for each label that begins with ``skep.`` and has no effect where it is.

    Managers of another version may know the label, so it is only a warning.
    """
    container = spec.task_template.container_spec
    yield from _unknown(spec.labels, SERVICE_LABELS, CONTAINER_LABELS, "container", "service")
    if container is not None:
        yield from _unknown(container.labels, CONTAINER_LABELS, SERVICE_LABELS, "service", "container")


def _unknown(
    labels: Mapping[str, str], known: Collection[str], others: Collection[str], owner: str, here: str
) -> Iterator[str]:
    for name in sorted(labels):
        if (
            not name.startswith(PREFIX)
            or {name, label_class(name)} & {*known}
            or (here == "service" and name.startswith(_PUBLISH))
        ):
            continue
        if {name, label_class(name)} & {*others} or (owner == "service" and name.startswith(_PUBLISH)):
            yield f"label {name} has no effect on a {here}: it is a label of the {owner}"
        elif name in NODE_LABELS:
            yield f"label {name} has no effect on a {here}: it is a label of nodes"
        else:
            yield f"unknown label {name}: it has no effect{_hint(name, known, others, owner)}"


def _hint(name: str, known: Collection[str], others: Collection[str], owner: str) -> str:
    if here := suggested_label(name, known):
        return f", did you mean {here}?"
    there = suggested_label(name, others)
    return f", did you mean {there} on the {owner}?" if there else ""


def placement_warnings(spec: ServiceSpec, nodes: Collection[Node]) -> Iterator[str]:
    """Yield a warning if no node meets the constraints, and one if start-first cannot work on a single node."""
    placement = spec.task_template.placement
    constraints = placement.constraints if placement is not None else ()
    if constraints and not any(is_satisfied(constraints, node) for node in nodes):
        unknown = [unknown_key(one, nodes) for one in parsed(constraints)]
        because = "".join(f". {one[0].upper()}{one[1:]}" for one in unknown if one)
        yield f"no node meets the constraints ({', '.join(constraints)}): new tasks wait until one does{because}"
    update, ports = spec.update_config, host_ports(spec)
    if ports and update is not None and update.order is UpdateOrder.START_FIRST:
        named = ", ".join(f"{number}/{protocol}" for protocol, number in ports)
        yield (
            f"order start-first: two tasks cannot have the host-mode port {named} on one node, so without a further "
            "node the old task is stopped first"
        )
