"""One simulation run of a cluster: random requests and faults.  Then all faults end, and the cluster must converge.

``simulate(seed)`` returns all violations.  The same seed produces the same run.
"""

import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from random import Random
from typing import TypeAlias, cast

import msgspec

from sim.cluster import SimulatedCluster
from sim.faults.damping import lose_a_node, one_more_fault
from sim.faults.fault_injector import FaultInjector
from sim.faults.restore import restore
from sim.faults.targeted_faults import (
    cut_off_for_long,
    end_removed_nodes,
    leave_uneven,
    lose_a_node_for_long,
    move_during_report,
    restart_before_it_runs,
    serve_stale_state,
    take_an_update_back,
)
from sim.faults.trial import try_an_update
from sim.invariants.convergence import unmet
from sim.invariants.nodes.allocations import allocation_violations
from sim.invariants.nodes.preemption import held_by_lower
from sim.invariants.quiescence import is_leftover, live_violations, replica_violations
from sim.invariants.services.schedules import DECIDED_S, undecided
from sim.users.operators import Operators
from sim.users.random_specs import DEVICE, DEVICES, ENDING_IMAGES, FACT, KERNELS, MEMORY_BYTES
from sim.users.users import Users
from sim.world.images import BROKEN, CRASHING, HANGING
from sim.world.storage import SimulatedStorage
from skep.agent.executor.simulated import Behavior
from skep.errors import SkepError
from skep.manager.control_loops.failures import LONGEST_DELAY_S
from skep.manager.rebalance.records import rebalancing_in, start_run
from skep.model.options.constraints import FACT_LABEL
from skep.model.options.labels import allows_preemption
from skep.model.service import GenericResource, NamedResource, Resources, Service
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS, timestamp
from skep.model.volume import Volume
from skep.store.space import COMPACT_AT, QUOTA_BYTES
from skep.store.state import State

STEPS = 20
PAUSES_S = (0.01, 0.05, 0.2, 0.8, 2.0)
EXTENDED_PAUSES_S = (*PAUSES_S, 0.2, 0.8, 5.0, 20.0)
"""Pauses in runs with extensions.  Some are long, because schedules are due every minute."""
BEHIND_NAT = 0.2
"""Share of the workers that are behind one NAT, so that half of all runs have some."""
CONVERGED_S = 90.0
"""Time limit from the end of the last fault until the cluster has converged."""
TURNS_MAX = 240_000
"""Iterations of the event loop in two minutes.  A whole run has 24,000 on average, so ten times that number means a
busy loop.
"""
LONGEST_WAIT_S = LONGEST_DELAY_S + 10.0
"""Time limit for leftovers of finished work: the longest delay between two attempts, and a margin."""
POLL_S = 0.5
STOPPED_S = 2.0
"""Seconds for the slowest container to stop and to be reported."""


class RunResult(msgspec.Struct):
    """The result of one run."""

    seed: int
    violations: list[str]
    trace: list[str]
    """Last events before the end, or before the first violation."""


Live: TypeAlias = Callable[[SimulatedCluster, int, Random | None, Random | None], None]
"""Lets steps happen to a cluster, with the random numbers of extensions and of commands."""


def simulate(
    seed: int, steps: int = STEPS, *, extends: bool | None = None, live: Live | None = None
) -> RunResult:
    """Run the simulation of ``seed``.

    Args:
        extends: Whether users also request features that Docker does not have.  By default, in every second run.
        live: What happens to the cluster, or None for users and faults.
    """
    shape = Random(seed ^ 0x5EED)
    extends = seed % 2 == 1 if extends is None else extends
    behavior = Behavior(
        prepare_s=shape.choice((0.02, 0.1)), start_s=0.05, shutdown_s=shape.choice((0.05, 0.3, 1.0))
    )
    cluster = SimulatedCluster(
        managers=shape.choice((1, 3, 3, 3, 5)),
        workers=shape.randint(2, 5),
        seed=seed,
        behavior=behavior,
        skew=True,
        turns_max=TURNS_MAX,
        history_limit=shape.choice((None, 0, 1, 3)),
        storage=SimulatedStorage() if extends else None,
        capacity=capacity_of(shape) if extends else None,
    )
    for id in cluster.workers:
        if Random(f"NAT of {id} with seed {seed}").random() < BEHIND_NAT:
            cluster.put_behind_nat(id)
        if extends:
            facts = Random(f"facts of {id} with seed {seed}")
            cluster.nodes[id].add_labels({f"{FACT_LABEL}{FACT}": facts.choice(KERNELS)})
    try:
        with cluster:
            (live or _simulate)(
                cluster, steps, *((Random(seed ^ 0xE57), Random(seed ^ 0xC0D)) if extends else (None, None))
            )
    except Exception as error:
        cluster.observer.note(
            cluster.loop.time(), [f"{type(error).__name__}: {error}", traceback.format_exc()]
        )
    return RunResult(
        seed, list(cluster.observer.violations), cluster.observer.traced or cluster.trace.lines()
    )


def extended(seed: int) -> RunResult:
    """Run the simulation of ``seed`` with users that also request features that Docker does not have."""
    return simulate(seed, extends=True)


def capacity_of(shape: Random) -> Resources:
    """Return the resources of each worker, which are often too small for all services, so that priorities matter."""
    devices = (NamedResource(kind=DEVICE, value=one) for one in DEVICES)
    return Resources(
        nano_cpus=4_000_000_000,
        memory_bytes=shape.choice((3, 6, 16)) * MEMORY_BYTES,
        generic_resources=tuple(GenericResource(named_resource_spec=one) for one in devices),
    )


def _simulate(
    cluster: SimulatedCluster, steps: int, extensions: Random | None, commands: Random | None
) -> None:
    for node in cluster.nodes.values():
        node.broken_images.add(BROKEN)
        node.hanging_images.add(HANGING)
        node.ending_images.update(ENDING_IMAGES)
        node.sick_images.add(CRASHING)
    users, injector, random = Users(cluster, extensions, commands), FaultInjector(cluster), cluster.random
    operators = Operators(cluster, users, injector.healthy)
    users.begin()
    cluster.run_for(0.5)
    for _ in range(steps):
        match random.choices(("user", "operator", "fault"), (55, 12, 33))[0]:
            case "user":
                users.act()
            case "operator":
                operators.act()
            case _:
                injector.inject()
        _pause(cluster, injector, random.choice(PAUSES_S if extensions is None else EXTENDED_PAUSES_S))
        if cluster.observer.violations:
            return
    injector.end_all()
    cluster.trace.add("all faults ended")
    _until(cluster, lambda: [f"{name} does not end" for name in operators.under_way])
    end_removed_nodes(cluster)
    if extensions is not None:
        _check_due_times(cluster)
    cluster.give_managers()
    cluster.do(users.wait_until_finished())
    cluster.do(users.settle())
    cluster.do(users.activate_all())
    cluster.do(users.end_stack_commands())
    _converge(cluster)
    if cluster.observer.violations:
        return
    if random.random() < 0.3:
        cluster.do(users.remove_all())
        _until(cluster, lambda: [f"service {one.id} is still there" for one in cluster.view.find(Service)])
    cluster.run_for(2.0)
    leave_uneven(cluster, users)
    _rebalance(cluster)
    _check_quiescence(cluster)
    revision, workers = cluster.raft.kv.revision, cluster.workers
    if random.random() < 0.4:
        one_more_fault(cluster)
    cut_off_for_long(cluster)
    restart_before_it_runs(cluster)
    take_an_update_back(cluster, users)
    serve_stale_state(cluster)
    move_during_report(cluster)
    if extensions is not None:
        try_an_update(cluster, users, extensions)
        if extensions.random() < 0.5:
            lose_a_node_for_long(cluster)
    lose_a_node(cluster)
    if random.random() < 0.3 and not cluster.observer.violations and cluster.workers == workers:
        users.receiver.restore()
        _restore(cluster, revision)


def _check_due_times(cluster: SimulatedCluster) -> None:
    """Check that every due time is decided.  Uses the slowest clock, because any manager may lead."""
    cluster.run_for(DECIDED_S + 2 * STOPPED_S)
    slowest_ns = min(cluster.clocks[id].now_ns() for id in cluster.managers)
    now = timestamp(slowest_ns - round(DECIDED_S * SECOND_NS))
    cluster.observer.note(cluster.loop.time(), undecided(cluster.view, now))


def _pause(cluster: SimulatedCluster, injector: FaultInjector, seconds: float) -> None:
    """Let time pass, and end the faults that are due meanwhile."""
    until = cluster.loop.time() + seconds
    while (left_s := until - cluster.loop.time()) > 0 and not cluster.observer.violations:
        cluster.run_for(min(left_s, PAUSES_S[-1]))
        injector.end_due()


def _restore(cluster: SimulatedCluster, revision: int) -> None:
    """Restore a snapshot that is older than the state of the nodes.  The cluster must converge to the snapshot."""
    restore(cluster, revision)
    _converge(cluster)
    cluster.run_for(STOPPED_S)
    before = set(cluster.rest_violations())
    cluster.run_for(STOPPED_S)
    note, now = cluster.observer.note, cluster.loop.time()
    note(now, [violation for violation in cluster.rest_violations() if violation in before])
    note(now, allocation_violations(cluster.view))


def _converge(cluster: SimulatedCluster) -> None:
    observer = cluster.observer

    def given_up(service: Service) -> int:
        return observer.restarts.given_up(service) if observer.failures.may_be_given_up(service) else 0

    def missing() -> Iterable[str]:
        for one in cluster.view.find(Service):
            yield from unmet(cluster.view, one, given_up(one))
        yield from observer.times_to_live.overdue(cluster.loop.time(), cluster.view)
        yield from ("the root is still being rotated" for one in cluster.view.find(Swarm) if one.rotation)
        if cluster.raft.space.has_alarm or cluster.raft.space.in_use > COMPACT_AT * QUOTA_BYTES:
            yield "the store still has its alarm or is over its limit"
        for volume in cluster.view.find(Volume):
            gone = [one.node_id for one in volume.publish_status if one.node_id not in cluster.workers]
            yield from (f"volume {volume.id} is published on {id}, which is gone" for id in gone)
        yield from (f"{id} has no session" for id in cluster.workers if not cluster.nodes[id].has_session)
        if (voters := {member.id for member in cluster.raft.voters}) != set(cluster.managers):
            yield f"{sorted(voters)} vote, and {sorted(cluster.managers)} are managers"

    _until(cluster, missing)


def _until(cluster: SimulatedCluster, missing: Callable[[], Iterable[str]]) -> None:
    """Advance time until nothing is missing.  A timeout is a violation."""
    until = cluster.loop.time() + CONVERGED_S
    while lacking := list(missing()):
        if cluster.loop.time() > until:
            cluster.observer.note(cluster.loop.time(), [f"not after {CONVERGED_S} s: {lacking}"])
            return
        cluster.run_for(POLL_S)


def _rebalance(cluster: SimulatedCluster) -> None:
    """Let the leader spread the tasks of a cluster at rest.  It has to end, and the cluster to converge again."""

    async def start() -> None:
        for manager in cluster.running_managers.values():
            if manager.store is not None:
                await manager.store.update(start_run, "", timestamp(0))
                return

    with suppress(SkepError):
        cluster.do(start())
    _until(cluster, lambda: ["it is rebalanced"] if rebalancing_in(cluster.view).run is not None else [])
    _converge(cluster)


def _check_quiescence(cluster: SimulatedCluster) -> None:
    """Check the invariants of a cluster at rest."""
    note, now = cluster.observer.note, cluster.loop.time
    # Services with crashing containers are never at rest, so only violations that persist count.
    before, left = set(_rest_violations(cluster)), set(_leftovers(cluster))
    cluster.run_for(STOPPED_S)
    note(now(), [violation for violation in _rest_violations(cluster) if violation in before])
    # A write to a dead leader waits for its timeout, and a failed decision for its next attempt.
    until = now() + LONGEST_WAIT_S
    while (left := left.intersection(_leftovers(cluster))) and now() < until:
        cluster.run_for(POLL_S)
    note(now(), sorted(left))
    note(now(), allocation_violations(cluster.view))
    acknowledgements = cluster.observer.acknowledgements
    note(now(), acknowledgements.broken(cluster.view, acknowledgements.given()))
    for id in cluster.managers:
        note(now(), cluster.do(_replica_violations(cluster, id)))


def _rest_violations(cluster: SimulatedCluster) -> Iterable[str]:
    yield from cluster.rest_violations()
    yield from (one for one in live_violations(cluster.view) if not is_leftover(one))
    if any(allows_preemption(one.spec.labels) for one in cluster.view.find(Swarm)):
        yield from held_by_lower(cluster.view)


def _leftovers(cluster: SimulatedCluster) -> Iterable[str]:
    yield from cluster.leftovers()
    yield from filter(is_leftover, live_violations(cluster.view))


async def _replica_violations(cluster: SimulatedCluster, id: NodeId) -> list[str]:
    store = cluster.running_managers[id].store
    if store is None:
        return [f"{id} serves nothing"]
    await store.barrier()
    return list(replica_violations(id, cast("State", store.view()), cluster.committed.view))
