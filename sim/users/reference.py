"""A reference model of Docker's responses to requests on services and nodes, and of the resulting state.

Written from Docker's API reference and documentation and from recorded responses of an engine
(``tests/conformance/recorded/in_swarm.json``), independently of ``manager/control``, with which it shares only the
objects.  It covers only the requests of simulated users.

Statuses are the HTTP API's. 503 is not modeled, because after it the outcome is unknown.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias, assert_never

import msgspec

from skep.errors import InvalidArgument
from skep.model.node import NodeSpec
from skep.model.options.autoscaling import may_be_at_zero
from skep.model.options.dependencies import dependencies_of
from skep.model.options.labels import STOPPED, is_stopped
from skep.model.quota import QuotaSpec
from skep.model.service import PublishMode, ServiceSpec, UpdateFailureAction, UpdateOrder
from skep.model.staging.updates import check_staged_update
from skep.model.values.ids import NodeId, ServiceId
from skep.model.values.stacks import STACK_LABEL

BAD, FORBIDDEN, MISSING, TAKEN, UNKNOWN, NOT_OFFERED = 400, 403, 404, 409, 500, 501
"""UNKNOWN is for errors of SwarmKit without a code, such as invalid constraints and updates out of sequence."""

_NAME = re.compile(r"[a-zA-Z0-9]+(?:[a-zA-Z0-9-_]*[a-zA-Z0-9]+)?")
_CONSTRAINT = re.compile(
    r"\s*[a-z_][\w.]*\s*((==|!=)\s*\w[\w.-]*| (not )?(in \([\w, ]+\)|exists|like [\w*]+)| [<>]=? [\d.]+)\s*"
)
"""Only the part of the syntax that simulated users write."""
_MEMORY_MIN = 4 << 20
_DISCONNECT_WORDS = (None, "keep", "replace", "stop")


class ServiceState(msgspec.Struct, frozen=True):
    """A service that is not removed."""

    spec: ServiceSpec
    previous: ServiceSpec | None
    version: int
    runs: int = 0
    """Number of updates of a job without a schedule."""


class State(msgspec.Struct, frozen=True):
    """The state on which responses depend."""

    services: Mapping[ServiceId, ServiceState] = {}
    nodes: Mapping[NodeId, tuple[NodeSpec, int]] = {}
    """The spec and version of each node."""
    networks: frozenset[str] = frozenset()
    secrets: frozenset[str] = frozenset()
    quotas: Mapping[str, QuotaSpec] = {}
    """Quota of each stack."""
    unshared: frozenset[str] = frozenset()
    """Names of the cluster volumes that only one task at a time can have."""


class Create(msgspec.Struct, frozen=True):
    id: ServiceId
    spec: ServiceSpec


class Update(msgspec.Struct, frozen=True):
    id: ServiceId
    spec: ServiceSpec
    version: int


class Rollback(msgspec.Struct, frozen=True):
    id: ServiceId
    version: int


class Remove(msgspec.Struct, frozen=True):
    id: ServiceId


class SetNode(msgspec.Struct, frozen=True):
    id: NodeId
    spec: NodeSpec
    version: int


Request: TypeAlias = Create | Update | Rollback | Remove | SetNode


class Accepted(msgspec.Struct, frozen=True):
    """An accepted request.  ``service``: its state afterwards, except for the version.

    None after a removal or a request on a node.
    """

    service: ServiceState | None = None


class Refused(msgspec.Struct, frozen=True):
    status: int


def respond(state: State, request: Request) -> Accepted | Refused:
    """Return the response to ``request`` in ``state``."""
    match request:
        case Create(_, spec):
            return _created(state, spec)
        case Update(id, spec, version):
            return _updated(state, id, spec, version)
        case Rollback(id, version):
            return _rolled_back(state, id, version)
        case Remove(id):
            return Accepted() if id in state.services else Refused(MISSING)
        case SetNode(id, _, version):
            known = state.nodes.get(id)
            if known is None:
                return Refused(MISSING)
            return Accepted() if known[1] == version else Refused(UNKNOWN)
        case _:
            assert_never(request)


def automatic_rollback(held: ServiceState) -> ServiceState | None:
    """Return the service after an automatic rollback, which removes the previous spec.  None if its settings forbid
    rollbacks.
    """
    config = held.spec.update_config
    is_asked = config is not None and config.failure_action is UpdateFailureAction.ROLLBACK
    if held.previous is None or not (is_asked or is_staged(held.spec)):
        return None
    return ServiceState(held.previous, None, 0)


def is_staged(spec: ServiceSpec) -> bool:
    """Return whether the spec's updates are staged.  They always roll back after a failure."""
    return "skep.update" in spec.labels


def rejection_of(spec: ServiceSpec) -> int | None:
    """Return the status with which an invalid spec is refused, or None for a valid spec."""
    template, container = spec.task_template, spec.task_template.container_spec
    if _NAME.fullmatch(spec.name) is None or len(spec.name) > 63:
        return BAD
    if spec.labels.get("skep.on-disconnect") not in _DISCONNECT_WORDS:
        return BAD
    if is_staged(spec) and _cannot_be_staged(spec):
        return BAD
    if "skep.autoscale" in spec.labels and spec.mode.name != "replicated":
        return BAD
    if "skep.min-available" in spec.labels and spec.mode.name != "replicated":
        return BAD
    if "skep.cron" in spec.labels and not is_job(spec):
        return BAD
    if "skep.max-skew" in spec.labels and spec.mode.name in ("global", "global-job"):
        return BAD
    reserved = template.resources.reservations if template.resources is not None else None
    if reserved is not None and 0 != reserved.memory_bytes < _MEMORY_MIN:
        return BAD
    if template.restart_policy is not None and (template.restart_policy.delay or 0) < 0:
        return BAD
    if template.placement is not None and not all(map(_CONSTRAINT.fullmatch, template.placement.constraints)):
        return UNKNOWN
    if container is None or not container.image:
        return BAD
    update = spec.update_config
    if update is not None and (is_job(spec) or not 0 <= update.max_failure_ratio <= 1):
        return BAD
    ports = spec.endpoint_spec.ports if spec.endpoint_spec is not None else ()
    published = [(port.protocol, port.published_port) for port in ports if port.published_port]
    return BAD if len(set(published)) < len(published) else None


def is_job(spec: ServiceSpec) -> bool:
    """Return whether the tasks of ``spec`` run to completion."""
    return spec.mode.replicated_job is not None or spec.mode.global_job is not None


def _created(state: State, spec: ServiceSpec) -> Accepted | Refused:
    if (fault := rejection_of(spec)) is not None:
        return Refused(fault)
    if _may_wait_forever(state, spec):
        return Refused(BAD)
    if _exceeds_quota(state, None, spec):
        return Refused(FORBIDDEN)
    if _cannot_start_first(state, spec, None):
        return Refused(BAD)
    if _lacks_secrets(state, spec):
        return Refused(BAD)
    if _is_taken(spec.name, state.services.values()):
        return Refused(TAKEN)
    return _conflict(state, None, spec) or Accepted(ServiceState(spec, None, 0))


def _is_taken(name: str, services: Iterable[ServiceState]) -> bool:
    """Return whether a service has this name.  Names are compared case-insensitively."""
    return any(held.spec.name.casefold() == name.casefold() for held in services)


def _updated(state: State, id: ServiceId, spec: ServiceSpec, version: int) -> Accepted | Refused:
    held = state.services.get(id)
    if (fault := rejection_of(spec)) is not None:
        return Refused(fault)
    if held is None:
        return Refused(MISSING)
    if _lacks_secrets(state, spec):
        return Refused(BAD)
    if _mode(held.spec) != _mode(spec) or held.spec.name != spec.name:
        return Refused(NOT_OFFERED)
    if held.version != version:
        return Refused(UNKNOWN)
    if _may_wait_forever(state, spec):
        return Refused(BAD)
    if _exceeds_quota(state, id, spec):
        return Refused(FORBIDDEN)
    if _cannot_start_first(state, spec, held.spec):
        return Refused(BAD)
    return _conflict(state, id, spec) or Accepted(
        ServiceState(spec, _previous(held.spec, spec), 0, _next_run(held))
    )


def _previous(spec: ServiceSpec, new: ServiceSpec) -> ServiceSpec:
    """Return ``spec`` as the previous one of ``new``, without a stop that ``new`` ends."""
    if not is_stopped(spec.labels) or is_stopped(new.labels):
        return spec
    return msgspec.structs.replace(
        spec, labels={name: text for name, text in spec.labels.items() if name != STOPPED}
    )


def _rolled_back(state: State, id: ServiceId, version: int) -> Accepted | Refused:
    held = state.services.get(id)
    if held is None:
        return Refused(MISSING)
    if held.version != version:
        return Refused(UNKNOWN)
    if held.previous is None:
        return Refused(BAD)
    if _may_wait_forever(state, held.previous):
        return Refused(BAD)
    if _exceeds_quota(state, id, held.previous):
        return Refused(FORBIDDEN)
    if _cannot_start_first(state, held.previous, None):
        return Refused(BAD)
    return _conflict(state, id, held.previous) or Accepted(
        ServiceState(held.previous, held.spec, 0, _next_run(held))
    )


def _may_wait_forever(state: State, spec: ServiceSpec) -> bool:
    """Return whether a service needs another service that may have no task, or whether affinities forbid ``spec``."""
    if _contradicts(state, spec):
        return True
    specs = [held.spec for held in state.services.values() if held.spec.name != spec.name]
    sleepy = {one.name.casefold() for one in (*specs, spec) if may_be_at_zero(one.labels)}
    changed = spec.name.casefold()
    return any(
        needed.is_required and needed.key in sleepy and (one is spec or needed.key == changed)
        for one in (*specs, spec)
        for needed in dependencies_of(one.labels)
    )


def _rules(spec: ServiceSpec, label: str) -> dict[str, str]:
    """Return the label of nodes that each named service's rule is about, or an empty text for single nodes."""
    parts = [part.partition("@") for part in spec.labels.get(label, "").casefold().split(",") if part]
    return {name: topology for name, _, topology in parts}


def _contradicts(state: State, spec: ServiceSpec) -> bool:
    """Return whether ``spec`` has to be near a service that keeps apart from it, or waits for itself through others."""
    own = spec.name.casefold()
    specs = {held.spec.name.casefold(): held.spec for held in state.services.values()}
    specs[own] = spec
    for name, other in specs.items():
        pairs = ((own, spec, name, other), (name, other, own, spec))
        for one, with_near, another, with_apart in pairs if name != own else ():
            near = _rules(with_near, "skep.affinity").get(another)
            apart = _rules(with_apart, "skep.anti-affinity").get(one)
            if near is not None and apart is not None and near in ("", apart):
                return True
    seen, pending = set[str](), [own]
    while pending:
        name = pending.pop()
        if name not in specs:
            continue
        waits = {
            *_rules(specs[name], "skep.affinity"),
            *(one.key for one in dependencies_of(specs[name].labels)),
        }
        if own in waits and name != own:
            return True
        pending += waits - seen
        seen |= waits
    return False


def _conflict(state: State, id: ServiceId | None, spec: ServiceSpec) -> Refused | None:
    """Refuse a spec if another service publishes one of its ports, or an object it refers to does not exist."""
    mine = _ports(spec)
    for other, held in state.services.items():
        theirs = _ports(held.spec)
        both_on_nodes = PublishMode.HOST, PublishMode.HOST
        if other != id and any(
            port in theirs and (mode, theirs[port]) != both_on_nodes for port, mode in mine.items()
        ):
            return Refused(BAD)
    container = spec.task_template.container_spec
    secrets = {one.secret_id for one in container.secrets} if container is not None else set()
    networks = {one.target for one in spec.task_template.networks}
    return None if secrets <= state.secrets and networks <= state.networks else Refused(MISSING)


def _ports(spec: ServiceSpec) -> dict[tuple[str, int], PublishMode]:
    """Return the publish modes of its ports with fixed numbers."""
    ports = spec.endpoint_spec.ports if spec.endpoint_spec is not None else ()
    return {(port.protocol, port.published_port): port.publish_mode for port in ports if port.published_port}


def _lacks_secrets(state: State, spec: ServiceSpec) -> bool:
    container = spec.task_template.container_spec
    return container is not None and not {one.secret_id for one in container.secrets} <= state.secrets


def _mode(spec: ServiceSpec) -> tuple[bool, bool, bool]:
    mode = spec.mode
    return mode.global_ is not None, mode.replicated_job is not None, mode.global_job is not None


def _cannot_be_staged(spec: ServiceSpec) -> bool:
    try:
        check_staged_update(spec)
    except InvalidArgument:
        return True
    return False


def _cannot_start_first(state: State, spec: ServiceSpec, present: ServiceSpec | None) -> bool:
    """Return whether new tasks would have to run together with old tasks that use their cluster volume.

    Scaling such a service is allowed.
    """
    container, configs = spec.task_template.container_spec, (spec.update_config, spec.rollback_config)
    if container is None:
        return False
    if present is not None and spec == msgspec.structs.replace(present, mode=spec.mode):
        return False
    starts_first = any(one is not None and one.order is UpdateOrder.START_FIRST for one in configs)
    return starts_first and any(one.source in state.unshared for one in container.mounts)


def _next_run(held: ServiceState) -> int:
    """Return the number of the next run.  An update of a job starts one, unless the job has a schedule."""
    return held.runs + 1 if is_job(held.spec) and "skep.cron" not in held.spec.labels else 0


# -- quotas of stacks, which Docker does not have --------------------------------------------------------------------


def _exceeds_quota(state: State, id: ServiceId | None, spec: ServiceSpec) -> bool:
    """Return whether the stack's quota forbids ``spec``.  A quota allows every spec that does not request more than
    before.
    """
    stack = spec.labels.get(STACK_LABEL, "")
    if (quota := state.quotas.get(stack)) is None:
        return False
    held = state.services.get(id) if id is not None else None
    was_in_it = held is not None and held.spec.labels.get(STACK_LABEL) == stack
    before = _taken_by(state, held.spec) if held is not None and was_in_it else (0, 0)
    wanted = _taken_by(state, spec)
    others = [
        _taken_by(state, one.spec)
        for other, one in state.services.items()
        if other != id and one.spec.labels.get(STACK_LABEL) == stack
    ]
    grows = any(map(int.__gt__, wanted, before))
    if quota.memory_bytes and wanted[0] and not wanted[1] and grows:
        return True  # a task without a reservation of a limited resource is refused
    for number, bound in enumerate((quota.tasks, quota.memory_bytes)):
        used = sum(one[number] for one in others)
        if bound and used + wanted[number] > bound and wanted[number] > before[number]:
            return True
    return False


def _taken_by(state: State, spec: ServiceSpec) -> tuple[int, int]:
    """Return the tasks of a service, and the memory that they reserve together."""
    job, resources = spec.mode.replicated_job, spec.task_template.resources
    if spec.mode.name in ("global", "global-job"):
        tasks = len(state.nodes)
    else:
        tasks = spec.replicas if job is None else job.max_concurrent or job.total_completions or 1
    reserved = resources.reservations if resources is not None else None
    return tasks, tasks * (reserved.memory_bytes if reserved is not None else 0)
