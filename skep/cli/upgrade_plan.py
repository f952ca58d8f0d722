"""What ``skep upgrade`` does next, and what forbids it: pure.

One node at a time: workers, then managers, the leader last, since every transfer of leadership costs a moment.  The
plan is made anew from the cluster's state before every step, so that an interrupted upgrade goes on where it was.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from skep.model.labels import VOLUME_AFFINITY, VolumeAffinity, volume_affinity
from skep.model.planes import NODE_LABEL
from skep.model.service import TaskSpec
from skep.model.slot_volumes import local_volumes

_RUNNING = "running"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the plan needs it."""

    id: str
    name: str
    version: str = ""
    address: str = ""
    is_manager: bool = False
    is_leader: bool = False
    is_ready: bool = True
    """A manager is reachable, too."""
    is_ours: bool = True
    """A skep node, no Docker Engine."""
    availability: str = "active"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A replicated service and where its tasks run."""

    id: str
    name: str
    replicas: int
    away_max: int
    """How many its update policy takes away at a time; 0: all."""
    on: Mapping[str, int]
    """Node id -> running tasks."""
    returns: bool = False
    """Its tasks return to the nodes that have their data in local volumes: an update does not spread them."""

    def excess(self, node: str) -> int:
        """How many more would be away with ``node`` than the update policy takes away."""
        away = self.replicas - sum(self.on.values()) + self.on.get(node, 0)
        return max(away - (self.away_max or self.replicas), 0)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One node's turn.  ``spread``: services to distribute anew first, as too many of their tasks are on the node."""

    node: Member
    drains: bool
    spread: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The steps in their order.  With ``refusals`` none of them may be made now."""

    steps: tuple[Step, ...]
    done: tuple[str, ...]
    """Nodes that have the version."""
    left_out: tuple[str, ...]
    """Docker nodes, and workers that are down."""
    refusals: tuple[str, ...]


def plan(
    members: Iterable[Member],
    services: Sequence[Running],
    version: str,
    *,
    drains: bool,
    spread: Iterable[str] = (),
    first: str = "",
) -> Plan:
    """What is to be done until all nodes have ``version``.

    Args:
        drains: tasks leave a node before its turn; otherwise they run on while its daemon restarts.
        spread: services that were distributed anew for the next step already: what is left of them is refused.
        first: the node whose turn was interrupted; it is the next one, and is away already.
    """
    nodes = sorted(members, key=_turn)
    ours = [one for one in nodes if one.is_ours]
    left_out = [
        one for one in nodes if not one.is_ours or not (one.is_manager or one.is_ready or one.id == first)
    ]
    due = [one for one in ours if one.version != version and one not in left_out]
    due.sort(key=lambda one: one.id != first)
    refusals = list(refusals_of_quorum(nodes, due[0], first) if due else ())
    steps = []
    for node in due:
        crowded = [one for one in services if drains and one.excess(node.id) and not one.returns]
        steps.append(Step(node=node, drains=drains, spread=tuple(one.name for one in crowded)))
    if steps and drains:
        refusals += _refusals_of_replicas(steps[0].node, nodes, services, frozenset(spread))
    return Plan(
        steps=tuple(steps),
        done=tuple(one.name for one in ours if one.version == version),
        left_out=tuple(one.name for one in left_out),
        refusals=tuple(refusals),
    )


def _turn(node: Member) -> tuple[bool, bool, str, str]:
    return (node.is_manager, node.is_leader, node.name, node.id)


def refusals_of_quorum(nodes: Iterable[Member], away: Member, first: str = "") -> Iterator[str]:
    """Why ``away`` may not be away now, for the managers' sake.

    ``first``: a node that may be away already, as it is this one's turn.
    """
    managers = [one for one in nodes if one.is_manager]
    for one in managers:
        if not one.is_ready and one.id not in (away.id, first):
            yield f"the manager {one.name} is not reachable: bring it back first (skep status)"
    if away.is_manager and len(managers) == 2:
        yield (
            f"there are two managers, which need each other: demote one (docker node demote {away.name}) or add a third"
        )


def _refusals_of_replicas(
    away: Member, nodes: Sequence[Member], services: Sequence[Running], spread: frozenset[str]
) -> Iterator[str]:
    others = [one for one in nodes if one.id != away.id and one.is_ready and one.availability == "active"]
    if any(away.id in one.on for one in services) and not others:
        yield f"no other node could take the tasks of {away.name}: --keep-running lets containers run on"
        return
    for one in services:
        running = sum(one.on.values())
        if running < one.replicas and away.availability == "active":
            yield f"{one.name} runs {running} of {one.replicas} tasks: see skep explain {one.name}"
        elif one.excess(away.id) and (one.returns or one.name in spread):
            text = (
                f"{one.name} has {one.on[away.id]} of its {one.replicas} tasks on {away.name}, and its update policy "
                f"takes away {one.away_max} at a time: docker service update --update-parallelism, or --keep-running"
            )
            if one.returns:
                text += (
                    "; its tasks return to the data in their local volumes, unless the service has the label "
                    f"{VOLUME_AFFINITY}={VolumeAffinity.NONE.value}"
                )
            yield text


def members_of(nodes: Iterable[Mapping[str, Any]]) -> list[Member]:
    """Of ``GET /nodes``."""
    return [_member(node) for node in nodes]


def _member(node: Mapping[str, Any]) -> Member:
    manager, engine = node.get("ManagerStatus"), node["Description"].get("Engine") or {}
    is_reachable = manager is None or manager.get("Reachability") == "reachable"
    return Member(
        id=node["ID"],
        name=node["Description"].get("Hostname") or node["ID"],
        version=engine.get("EngineVersion", ""),
        address=node["Status"].get("Addr", ""),
        is_manager=manager is not None or node["Spec"].get("Role") == "manager",
        is_leader=bool(manager and manager.get("Leader")),
        is_ready=node["Status"]["State"] == "ready" and is_reachable,
        is_ours=NODE_LABEL in (engine.get("Labels") or {}),
        availability=node["Spec"].get("Availability", "active"),
    )


def running_of(services: Iterable[Mapping[str, Any]], tasks: Iterable[Mapping[str, Any]]) -> list[Running]:
    """Of ``GET /services`` and ``GET /tasks``: replicated services; tasks of global ones and jobs do not move."""
    on: dict[str, dict[str, int]] = {}
    for task in tasks:
        if task["Status"]["State"] == _RUNNING and task["DesiredState"] == _RUNNING:
            counts = on.setdefault(task.get("ServiceID", ""), {})
            counts[task["NodeID"]] = counts.get(task["NodeID"], 0) + 1
    found = []
    for service in services:
        replicated = service["Spec"].get("Mode", {}).get("Replicated")
        if replicated is None:
            continue
        policy = service["Spec"].get("UpdateConfig") or {}
        template = msgspec.convert(service["Spec"].get("TaskTemplate") or {}, TaskSpec)
        is_free = volume_affinity(service["Spec"].get("Labels") or {}) is VolumeAffinity.NONE
        found.append(
            Running(
                id=service["ID"],
                name=service["Spec"]["Name"],
                replicas=replicated.get("Replicas", 1),
                away_max=policy.get("Parallelism", 1),
                on=on.get(service["ID"], {}),
                returns=bool(local_volumes(template)) and not is_free,
            )
        )
    return sorted(found, key=lambda one: one.name)
