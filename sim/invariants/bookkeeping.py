"""Invariants of the loops' caches: they match the store, and keep nothing of finished work.

The caches of the allocator, the scheduler and the orchestrator are updated with each commit.  Whenever a leader has no
write in progress, they equal caches built from its store.  The writes, waits, sessions and streams that a manager at
rest still holds belong to existing objects.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sim.world.manager import SimulatedManager
from skep.manager.allocator.allocations import Allocations
from skep.manager.allocator.loop import Allocator
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.work_queue import WorkQueue
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.scheduler.decision_writer import is_pending
from skep.manager.scheduler.loop import Scheduler
from skep.manager.scheduler.nodes.accounting import Accounting, holds_resources, usage_in
from skep.manager.scheduler.preemption.preemptor import claim_id
from skep.manager.verify.allocations import PORT, holdings
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId
from skep.store.etcd.store import EtcdStore
from skep.store.interface import View

STREAMS_MAX = 5
"""Streams of one session: its messages, its assignments, its tables, its keys and its probes."""


class CachesMatchStore:
    """Compares the caches of a leader without a write in progress with its store, at intervals.

    A difference counts if two consecutive checks find it, because the latest commit may not have been processed yet.
    """

    def __init__(self) -> None:
        self._before: dict[NodeId, tuple[int, frozenset[str]]] = {}
        """Revision of each leader's store at the last check, and the differences found."""

    def __call__(self, id: NodeId, loops: Iterable[object], view: View) -> Iterable[str]:
        revision, before = self._before.get(id, (0, frozenset()))
        if revision == view.revision and not before:
            return ()
        found = frozenset(cache_differences(loops, view))
        self._before[id] = view.revision, found
        return sorted(found & before)


def cache_differences(loops: Iterable[object], view: View) -> Iterable[str]:
    """Yield the differences between the caches of one leader's ``loops`` and ``view``, while no write is in
    progress.
    """
    for loop in loops:
        match loop:
            case Allocator():
                yield from _differences(
                    "allocator", _allocated(loop.state.allocations), _allocated(Allocations.of(view))
                )
                yield from _differences("allocator", _held(loop.state.allocations), _holding(view))
            case Scheduler():
                yield from _differences(
                    "scheduler", _placed(loop.state.accounting), _placed(_accounted(view, loop))
                )
                pending = {task.id for task in view.find(Task) if is_pending(task)}
                claiming = {one.task.id for claims in loop.state.preemptor._claims.values() for one in claims}
                yield from _differences("scheduler", {"claiming": claiming}, {"claiming": claiming & pending})
                yield from _differences(
                    "scheduler", {"waiting": set(loop.state.groups.of)}, {"waiting": pending}
                )
            case Orchestrator():
                known = {one.id for one in view.find(Service) if one.spec.mode.name.startswith("global")}
                yield from _differences(
                    "orchestrator", {"global": loop.state.global_services}, {"global": known}
                )
                yield from _stamps(loop, view)


def _stamps(loop: Orchestrator, view: View) -> Iterable[str]:
    seen = loop.state.seen
    for name, stamps in (
        ("created", seen.created_times),
        ("ran", seen._running),
        ("retired", seen._retired),
        ("ended", seen._ended),
    ):
        for id in stamps:
            if view.lookup(Task, id) is None:
                yield f"orchestrator: keeps when task {id}, which is gone, was {name}"
    for node_id in seen._down:
        if view.lookup(Node, node_id) is None:
            yield f"orchestrator: keeps when node {node_id}, which is gone, was down"


def _allocated(allocations: Allocations) -> Mapping[str, object]:
    held = {owner: sorted(map(str, places)) for owner, places in allocations.addresses._held.items()}
    return {
        "addresses": held,
        "taken": {key: dict(taken) for key, taken in allocations.addresses._taken.items()},
        "ports": allocations.ports._ports_by_service,
        "holders of ports": allocations.ports._holders,
        "VXLAN ids": allocations.networks._vxlan_ids,
        "subnets": allocations.networks._subnets,
        "removed networks": allocations._gone,
        "docker nodes": allocations.docker_nodes,
        "services that publish": allocations.publishing,
    }


def _held(allocations: Allocations) -> Mapping[str, object]:
    held = allocations.addresses._held.items()
    return {"addresses": {owner.rpartition("/")[2]: frozenset(places) for owner, places in held if places}}


def _holding(view: View) -> Mapping[str, object]:
    """Return the holders of addresses, computed from the objects without the allocator's code."""
    objects: list[Task | Service | Node] = [*view.find(Task), *view.find(Service), *view.find(Node)]
    held: dict[str, frozenset[object]] = {}
    for one in objects:
        places = [place for place in holdings(one) if place[0] != PORT]
        if places:
            held[one.id] = frozenset(((network, ip.version), int(ip)) for network, ip in places)  # type: ignore[attr-defined, call-overload]
    return {"addresses": held}


def _accounted(view: View, loop: Scheduler) -> Accounting:
    """Return what the tasks hold, and the scheduler's claims for pending tasks."""
    fresh = Accounting()
    for node in view.find(Node):
        fresh.set_node(node)
    for task in view.find(Task):
        if holds_resources(task):
            fresh.reserve(task.id, task.node_id, usage_in(view, task))
    for claims in loop.state.preemptor._claims.values():
        for one in claims:
            node_id, id = one.candidate.node_id, claim_id(one.task)
            fresh.reserve(id, node_id, loop.state.accounting.held(node_id)[id])
    return fresh


def _placed(accounting: Accounting) -> Mapping[str, object]:
    return {
        "nodes": {
            id: (
                account.free_nano_cpus,
                account.free_memory_bytes,
                account.active,
                account.load,
                +account.host_ports,
                account.unknown,
                account.node.spec,
                account.node.status.state,
            )
            for id, account in accounting.accounts.items()
        },
        "copies": accounting._copies,
        "usages": {id: usages for id, usages in accounting._usages.items() if usages},
        "places": accounting._node_of,
    }


def _differences(owner: str, has: Mapping[str, Any], should: Mapping[str, Any]) -> Iterable[str]:
    for name in should:
        if has[name] == should[name]:
            continue
        if isinstance(has[name], dict):
            keys = [
                key for key in {**has[name], **should[name]} if has[name].get(key) != should[name].get(key)
            ]
            before = [(key, has[name].get(key), should[name].get(key)) for key in keys[:3]]
            yield f"{owner}: {name} are not as in the store: " + ", ".join(
                f"{key}: {has_} and not {is_}" for key, has_, is_ in before
            )
        else:
            yield f"{owner}: {name} are not as in the store: {sorted(has[name] ^ should[name], key=str)}"


def leftovers(manager: SimulatedManager) -> Iterable[str]:
    """Yield the state of finished work that a manager at rest keeps."""
    store, dispatcher, logs = manager.store, manager.dispatcher, manager.logs
    if store is None or dispatcher is None or logs is None:
        yield "serves nothing"
        return
    yield from kept_of_writes(store)
    view, sessions = store.view(), dispatcher.sessions
    for id in (*sessions._live, *sessions.absent):
        if view.lookup(Node, id) is None:
            yield f"has a session of {id}, which is gone"
    for session in sessions.all():
        if len(session._signals) > STREAMS_MAX:
            yield f"has {len(session._signals)} streams in the session of {session.node_id}"
        if unread := {id for line in session._signals for id in line._changed}:
            yield f"has {sorted(unread)} to send to {session.node_id}"
    if dispatcher.stops.delayed:
        yield f"delays the stop of {sorted(dispatcher.stops.delayed)}"
    live = {session.id for session in sessions.all()}
    for session_id, kept in dispatcher.node_reports.repeats.delayed.items():
        if session_id not in live or kept.reports:
            yield f"keeps {len(kept.reports)} reports of {kept.node_id}"
    if logs.subscriptions or logs.relaying:
        yield f"has {len(logs.subscriptions)} readers of logs, and relays {len(logs.relaying)}"
    for loop in manager.loops:
        name, state = type(loop).__name__, getattr(loop, "state", None)
        queue, failures = getattr(state, "queue", None), getattr(state, "failures", None)
        if isinstance(queue, WorkQueue) and queue._is_due:
            yield f"{name} still has queued: {sorted(queue._is_due)}"
        if isinstance(failures, Failures) and failures._failures:
            yield f"{name} keeps failing: {failures._failures}"


def kept_of_writes(store: EtcdStore) -> Iterable[str]:
    """Yield the state of finished writes that a store at rest keeps."""
    batcher = store._batcher
    for name, kept in (
        ("waits", batcher._queue),
        ("is on its way", batcher._in_flight),
        ("is to be recognized", batcher.markers),
        ("has been recognized", batcher._observed),
    ):
        if kept:
            yield f"keeps what {name}: {len(kept)}"
    if store.replica.waiting:
        yield f"keeps {len(store.replica.waiting)} tasks that wait for a revision"
