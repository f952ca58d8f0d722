"""The next steps of ``skep upgrade``, and the reasons that forbid them.  Pure.

Nodes are upgraded one at a time: workers, then managers, the leader last, since every transfer of leadership takes a
moment.  The plan is computed from the cluster's state before every step, so an interrupted upgrade can resume.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from skep.cli.apps.service import is_job
from skep.model.networks.data_planes import NODE_LABEL
from skep.model.node_reports.conditions import BOOT_LABEL, reboot_reason
from skep.model.options.labels import VOLUME_AFFINITY, VolumeAffinity, is_stopped, volume_affinity
from skep.model.options.slot_volumes import local_volumes
from skep.model.service import TaskSpec

_RUNNING = "running"


class UpgradableNode(msgspec.Struct, frozen=True, kw_only=True):
    """The properties of a node that the plan needs."""

    id: str
    name: str
    version: str = ""
    boot: str = ""
    """Boot id of its kernel."""
    reboot: str = ""
    """Reason why the machine needs a reboot, or empty."""
    address: str = ""
    is_manager: bool = False
    is_leader: bool = False
    is_ready: bool = True
    """Whether the node is ready, and reachable if it is a manager."""
    is_ours: bool = True
    """Whether it is a skep node instead of a Docker Engine."""
    availability: str = "active"


class RunningService(msgspec.Struct, frozen=True, kw_only=True):
    """A replicated service and the nodes of its tasks."""

    id: str
    name: str
    replicas: int
    """Number of tasks that should run, without completed ones."""
    away_max: int
    """Number of tasks that its update policy replaces at a time, or 0 for all."""
    on: Mapping[str, int]
    """Running tasks by node id."""
    returns: bool = False
    """Whether its tasks return to the nodes with their local volumes, so that an update does not spread them."""

    def excess(self, node: str) -> int:
        """Return by how many tasks the loss of ``node`` would exceed the limit of the update policy."""
        away = self.replicas - sum(self.on.values()) + self.on.get(node, 0)
        return max(away - (self.away_max or self.replicas), 0)


class UpgradeStep(msgspec.Struct, frozen=True, kw_only=True):
    """The upgrade of one node."""

    node: UpgradableNode
    drains: bool
    spread: tuple[str, ...] = ()
    """Services to redistribute first, as the node has too many of their tasks."""
    jobs: tuple[str, ...] = ()
    """Jobs whose tasks run on the node now.  A drain stops them, and they start from the beginning."""


class UpgradePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The steps in their order.  With ``refusals``, none of them may be taken now."""

    steps: tuple[UpgradeStep, ...]
    done: tuple[str, ...]
    """Nodes that need nothing."""
    left_out: tuple[str, ...]
    """Docker nodes, and workers that are down."""
    refusals: tuple[str, ...]


def plan(
    members: Iterable[UpgradableNode],
    services: Sequence[RunningService],
    is_due: Callable[[UpgradableNode], bool],
    *,
    drains: bool,
    spread: Iterable[str] = (),
    first: str = "",
    degraded: Mapping[str, str] | None = None,
    jobs: Mapping[str, Sequence[str]] | None = None,
    can_keep: bool = True,
) -> UpgradePlan:
    """Return the steps until no node is due.

    Args:
        is_due: returns whether a node needs the upgrade.
        drains: drain each node before its upgrade; otherwise its tasks keep running while its daemon restarts.
        spread: services that were already redistributed for the next step.  If the node still has too many of their
            tasks, the step is refused.
        first: the node whose upgrade was interrupted, which comes next and may be down already.
        degraded: the reason of each degraded service, by name (``degraded_of``).  It refuses drains, but not the
            drain of ``first``, which has no tasks left.
        jobs: the names of the jobs that run on each node, by node id (``jobs_of``).
        can_keep: whether an upgrade without drains is possible, so that refusals propose it.
    """
    nodes = sorted(members, key=_turn)
    ours = [one for one in nodes if one.is_ours]
    left_out = [
        one for one in nodes if not one.is_ours or not (one.is_manager or one.is_ready or one.id == first)
    ]
    due = [one for one in ours if is_due(one) and one not in left_out]
    due.sort(key=lambda one: one.id != first)
    refusals = list(refusals_of_quorum(nodes, due[0], first) if due else ())
    steps = []
    for node in due:
        crowded = [one for one in services if drains and one.excess(node.id) and not one.returns]
        stopped = tuple((jobs or {}).get(node.id, ())) if drains else ()
        spread_first = tuple(one.name for one in crowded)
        steps.append(UpgradeStep(node=node, drains=drains, spread=spread_first, jobs=stopped))
    if steps and drains:
        unwell = {} if steps[0].node.id == first else degraded or {}
        refusals += [
            f"{name} is degraded: {reason.rstrip('.')}. Run skep explain {name}."
            for name, reason in unwell.items()
        ]
        healthy = [one for one in services if one.name not in unwell]
        refusals += _refusals_of_replicas(steps[0].node, nodes, healthy, frozenset(spread), can_keep=can_keep)
    return UpgradePlan(
        steps=tuple(steps),
        done=tuple(one.name for one in ours if not is_due(one)),
        left_out=tuple(one.name for one in left_out),
        refusals=tuple(refusals),
    )


def _turn(node: UpgradableNode) -> tuple[bool, bool, str, str]:
    return (node.is_manager, node.is_leader, node.name, node.id)


def refusals_of_quorum(
    nodes: Iterable[UpgradableNode], away: UpgradableNode, first: str = ""
) -> Iterator[str]:
    """Yield the reasons why ``away`` may not go down now, because the managers need it.

    ``first``: the node whose upgrade was interrupted, which may be down already.
    """
    managers = [one for one in nodes if one.is_manager]
    for one in managers:
        if not one.is_ready and one.id not in (away.id, first):
            yield f"the manager {one.name} is unreachable. Restart it first."
    if away.is_manager and len(managers) == 2:
        yield (f"two managers need each other. Demote one (docker node demote {away.name}), or add a third.")


def _refusals_of_replicas(
    away: UpgradableNode,
    nodes: Sequence[UpgradableNode],
    services: Sequence[RunningService],
    spread: frozenset[str],
    *,
    can_keep: bool,
) -> Iterator[str]:
    others = [one for one in nodes if one.id != away.id and one.is_ready and one.availability == "active"]
    if any(away.id in one.on for one in services) and not others:
        way = "Use --keep-running to keep them on the node" if can_keep else "Add or activate a node"
        yield f"no other node can run the tasks of {away.name}. {way}."
        return
    for one in services:
        running = sum(one.on.values())
        if running < one.replicas and away.availability == "active":
            yield f"{one.name} runs {running} of {one.replicas} tasks. Run skep explain {one.name}."
        elif one.excess(away.id) and (one.returns or one.name in spread):
            text = (
                f"{one.name} has {one.on[away.id]} of its {one.replicas} tasks on {away.name}, but its update policy "
                f"stops {one.away_max} at a time. Raise --update-parallelism of the service"
            ) + (", or use --keep-running." if can_keep else ".")
            if one.returns:
                text += (
                    " Its tasks stay with their local volumes. The label "
                    f"{VOLUME_AFFINITY}={VolumeAffinity.NONE.value} allows them to move."
                )
            yield text


def lines_of(found: UpgradePlan, words: Callable[[UpgradeStep], str]) -> Iterator[str]:
    """Yield the steps of an upgrade for people.  ``words`` returns the text about a step."""
    for number, step in enumerate(found.steps, 1):
        role = "leader" if step.node.is_leader else "manager" if step.node.is_manager else "worker"
        yield f"{number}. {step.node.name} ({role}): {words(step)}"
        if step.spread:
            yield f"   first redistributes the tasks of {', '.join(step.spread)}"
        if step.jobs:
            yield f"   stops tasks of jobs, which start from the beginning: {', '.join(step.jobs)}"
    if found.done:
        yield f"up to date: {', '.join(found.done)}"
    if found.left_out:
        yield f"skipped (Docker nodes, workers that are down): {', '.join(found.left_out)}"


def members_of(nodes: Iterable[Mapping[str, Any]]) -> list[UpgradableNode]:
    """Return the members for a response to ``GET /nodes``."""
    return [_member(node) for node in nodes]


def _member(node: Mapping[str, Any]) -> UpgradableNode:
    manager, engine = node.get("ManagerStatus"), node["Description"].get("Engine") or {}
    labels: Mapping[str, str] = engine.get("Labels") or {}
    is_reachable = manager is None or manager.get("Reachability") == "reachable"
    return UpgradableNode(
        id=node["ID"],
        name=node["Description"].get("Hostname") or node["ID"],
        version=engine.get("EngineVersion", ""),
        boot=labels.get(BOOT_LABEL, ""),
        reboot=reboot_reason(labels),
        address=node["Status"].get("Addr", ""),
        is_manager=manager is not None or node["Spec"].get("Role") == "manager",
        is_leader=bool(manager and manager.get("Leader")),
        is_ready=node["Status"]["State"] == "ready" and is_reachable,
        is_ours=NODE_LABEL in labels,
        availability=node["Spec"].get("Availability", "active"),
    )


def running_of(
    services: Iterable[Mapping[str, Any]], tasks: Iterable[Mapping[str, Any]]
) -> list[RunningService]:
    """Return the replicated services for responses to ``GET /services`` and ``GET /tasks``.

    Tasks of global services and jobs do not move, so these are left out.  So are stopped services.
    """
    on: dict[str, dict[str, int]] = {}
    for task in tasks:
        if task["Status"]["State"] == _RUNNING and task["DesiredState"] == _RUNNING:
            counts = on.setdefault(task.get("ServiceID", ""), {})
            counts[task["NodeID"]] = counts.get(task["NodeID"], 0) + 1
    found = []
    for service in services:
        replicated = service["Spec"].get("Mode", {}).get("Replicated")
        if replicated is None or is_stopped(service["Spec"].get("Labels") or {}):
            continue
        policy = service["Spec"].get("UpdateConfig") or {}
        template = msgspec.convert(service["Spec"].get("TaskTemplate") or {}, TaskSpec)
        is_free = volume_affinity(service["Spec"].get("Labels") or {}) is VolumeAffinity.NONE
        found.append(
            RunningService(
                id=service["ID"],
                name=service["Spec"]["Name"],
                replicas=replicated.get("Replicas", 1) - _completed(service),
                away_max=policy.get("Parallelism", 1),
                on=on.get(service["ID"], {}),
                returns=bool(local_volumes(template)) and not is_free,
            )
        )
    return sorted(found, key=lambda one: one.name)


def jobs_of(
    services: Iterable[Mapping[str, Any]], tasks: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[str, ...]]:
    """Return the names of the jobs that run on each node, by node id."""
    names = {one["ID"]: one["Spec"]["Name"] for one in services if is_job(one["Spec"])}
    on: dict[str, set[str]] = {}
    for task in tasks:
        if task["Status"]["State"] == _RUNNING and (name := names.get(task.get("ServiceID", ""))):
            on.setdefault(task["NodeID"], set()).add(name)
    return {node: tuple(sorted(some)) for node, some in on.items()}


def _completed(service: Mapping[str, Any]) -> int:
    count: int = (service.get("ServiceStatus") or {}).get("CompletedTasks", 0)
    return count


def degraded_of(services: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the reason of each degraded service for a response to ``GET /services?status=true&health=true``.

    Jobs are left out: a drain does not make a failed run worse.  A manager of an older version reports no health.
    """
    found = {}
    for service in services:
        mode = service["Spec"].get("Mode", {})
        health = (service.get("ServiceStatus") or {}).get("Health") or {}
        if health.get("State") == "degraded" and ("Replicated" in mode or "Global" in mode):
            found[service["Spec"]["Name"]] = health.get("Reason", "")
    return dict(sorted(found.items()))
