"""One simulation run of a cluster: random requests and faults; then all faults end, and the cluster must converge.

``simulate(seed)`` returns all violations.  The same seed gives the same run.
"""

import traceback
from collections.abc import Callable, Iterable
from random import Random
from typing import cast

import msgspec

from sim.cluster import SimulatedCluster
from sim.convergence import unmet
from sim.damping import lose_a_node, one_more_fault
from sim.fault_injector import FaultInjector
from sim.invariants.allocations import allocation_violations
from sim.invariants.quiescence import replica_violations
from sim.operators import Operators
from sim.random_specs import BROKEN, ENDING_IMAGES, HANGING
from sim.restore import restore
from sim.targeted_faults import (
    cut_off_for_long,
    move_during_report,
    restart_before_it_runs,
    serve_stale_state,
    take_an_update_back,
)
from sim.users import Users
from skep.agent.executor.simulated import Behaviour
from skep.manager.failures import LONGEST_DELAY_S
from skep.model.ids import NodeId
from skep.model.service import Service
from skep.store.space import COMPACT_AT, QUOTA_BYTES
from skep.store.state import State

STEPS = 20
PAUSES_S = (0.01, 0.05, 0.2, 0.8, 2.0)
CONVERGED_S = 90.0
"""Limit from the end of the last fault until the cluster has converged."""
TURNS_MAX = 240_000
"""Iterations of the event loop in one run; the average is 24,000.  More than ten times that is a busy loop."""
LONGEST_WAIT_S = LONGEST_DELAY_S + 10.0
"""Limit for leftovers of finished work to go: the longest delay between two attempts, and a margin."""
POLL_S = 0.5
STOPPED_S = 2.0
"""Time for the slowest container to stop, and for its report."""


class RunResult(msgspec.Struct):
    """The result of one run."""

    seed: int
    violations: list[str]
    trace: list[str]
    """The last events before the end, or before the first violation."""


def simulate(seed: int, steps: int = STEPS) -> RunResult:
    """Run the simulation of ``seed``."""
    shape = Random(seed ^ 0x5EED)
    behaviour = Behaviour(
        prepare_s=shape.choice((0.02, 0.1)), start_s=0.05, shutdown_s=shape.choice((0.05, 0.3, 1.0))
    )
    cluster = SimulatedCluster(
        managers=shape.choice((1, 3, 3, 3, 5)),
        workers=shape.randint(2, 5),
        seed=seed,
        behaviour=behaviour,
        skew=True,
        turns_max=TURNS_MAX,
        history_limit=shape.choice((None, 0, 1, 3)),
    )
    try:
        with cluster:
            _simulate(cluster, steps)
    except Exception as error:
        cluster.observer.note(
            cluster.loop.time(), [f"{type(error).__name__}: {error}", traceback.format_exc()]
        )
    return RunResult(
        seed, list(cluster.observer.violations), cluster.observer.traced or cluster.trace.lines()
    )


def _simulate(cluster: SimulatedCluster, steps: int) -> None:
    for node in cluster.nodes.values():
        node.broken_images.add(BROKEN)
        node.hanging_images.add(HANGING)
        node.ending_images.update(ENDING_IMAGES)
    users, injector, random = Users(cluster), FaultInjector(cluster), cluster.random
    operators = Operators(cluster, users, injector.healthy)
    users.create()
    cluster.run_for(0.5)
    for _ in range(steps):
        match random.choices(("user", "operator", "fault"), (55, 12, 33))[0]:
            case "user":
                users.act()
            case "operator":
                operators.act()
            case _:
                injector.inject()
        cluster.run_for(random.choice(PAUSES_S))
        injector.end_due()
        if cluster.observer.violations:
            return
    injector.end_all()
    cluster.trace.add("all faults ended")
    _until(cluster, lambda: [f"{name} does not end" for name in operators.under_way])
    cluster.give_managers()
    cluster.do(users.finished())
    cluster.do(users.activate_all())
    _converge(cluster)
    if random.random() < 0.3:
        cluster.do(users.remove_all())
        _until(cluster, lambda: [f"service {one.id} is still there" for one in cluster.view.find(Service)])
    cluster.run_for(2.0)
    _check_quiescence(cluster)
    revision = cluster.raft.kv.revision
    if random.random() < 0.4:
        one_more_fault(cluster)
    cut_off_for_long(cluster)
    restart_before_it_runs(cluster)
    take_an_update_back(cluster, users)
    serve_stale_state(cluster)
    move_during_report(cluster)
    lose_a_node(cluster)
    if random.random() < 0.3 and not cluster.observer.violations:
        _restore(cluster, revision)


def _restore(cluster: SimulatedCluster, revision: int) -> None:
    """Restore a snapshot, which is older than the state of the nodes: the cluster must converge to the snapshot."""
    restore(cluster, revision)
    _converge(cluster)
    cluster.run_for(STOPPED_S)
    before = set(cluster.rest_violations())
    cluster.run_for(STOPPED_S)
    note, now = cluster.observer.note, cluster.loop.time()
    note(now, [violation for violation in cluster.rest_violations() if violation in before])
    note(now, allocation_violations(cluster.view))


def _converge(cluster: SimulatedCluster) -> None:
    given_up = cluster.observer.restarts.given_up

    def missing() -> Iterable[str]:
        for one in cluster.view.find(Service):
            yield from unmet(cluster.view, one, given_up(one))
        if cluster.raft.space.has_alarm or cluster.raft.space.in_use > COMPACT_AT * QUOTA_BYTES:
            yield "the store still has its alarm or is over its limit"
        yield from (f"{id} has no session" for id in cluster.workers if not cluster.nodes[id].has_session)
        if (voters := {member.id for member in cluster.raft.voters}) != set(cluster.managers):
            yield f"{sorted(voters)} vote, and {sorted(cluster.managers)} are managers"

    _until(cluster, missing)


def _until(cluster: SimulatedCluster, missing: Callable[[], Iterable[str]]) -> None:
    """Advance time until nothing is missing; a timeout is a violation."""
    until = cluster.loop.time() + CONVERGED_S
    while lacking := list(missing()):
        if cluster.loop.time() > until:
            cluster.observer.note(cluster.loop.time(), [f"not after {CONVERGED_S} s: {lacking}"])
            return
        cluster.run_for(POLL_S)


def _check_quiescence(cluster: SimulatedCluster) -> None:
    """The invariants of a cluster at rest."""
    note, now = cluster.observer.note, cluster.loop.time
    # Services with crashing containers are never at rest, so only violations that persist count.
    before, left = set(cluster.rest_violations()), set(cluster.leftovers())
    cluster.run_for(STOPPED_S)
    note(now(), [violation for violation in cluster.rest_violations() if violation in before])
    # A write to a leader that is gone, or a failed decision, waits for its timeout or its next attempt.
    until = now() + LONGEST_WAIT_S
    while (left := left.intersection(cluster.leftovers())) and now() < until:
        cluster.run_for(POLL_S)
    note(now(), sorted(left))
    note(now(), allocation_violations(cluster.view))
    acknowledgements = cluster.observer.acknowledgements
    note(now(), acknowledgements.broken(cluster.view, acknowledgements.given()))
    for id in cluster.managers:
        note(now(), cluster.do(_replica_violations(cluster, id)))


async def _replica_violations(cluster: SimulatedCluster, id: NodeId) -> list[str]:
    store = cluster.running_managers[id].store
    if store is None:
        return [f"{id} serves nothing"]
    await store.barrier()
    return list(replica_violations(id, cast("State", store.view()), cluster.committed.view))
