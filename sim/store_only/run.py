"""A simulation run of only the store: keys instead of services, many times cheaper than a run of a whole cluster.

Managers consist of their store on a simulated etcd: the production updates, batcher, reflector, election, cipher and
replica.  Users swap, compare, delete and read the values of a few registers.  The leader allocates numbers, as the
allocator does, and watchers consume the commits.  Finally all faults end.  Then the responses must be linearizable, and
each write must have been applied once.

``simulate(seed)`` returns all violations.  The same seed produces the same run.
"""

import traceback
from collections.abc import Callable
from functools import partial

from sim.run import RunResult
from sim.store_only.faults import Faults
from sim.store_only.world import StoreWorld
from skep.store.etcd.election import CANDIDATE_POLL_S

STEPS = 12
ELECTIONS = 6
ELECTED_S = (0.8, 3.0)
"""Seconds until the others have elected a leader, or not yet, and that has written the leader key."""
PAUSES_S = (0.01, 0.1, 0.4, 1.5)
SLOW_RUNS = 0.05
LINES = 200


def simulate(seed: int, steps: int = STEPS) -> RunResult:
    """Run the simulation of ``seed``."""
    return _result(StoreWorld(seed), partial(_with_faults, steps=steps))


def elections(seed: int) -> RunResult:
    """Run the simulation of ``seed``, in which new leaders are cut off before they have written the leader key."""
    return _result(StoreWorld(seed, managers=3), _with_elections)


def _result(world: StoreWorld, simulate: Callable[[StoreWorld], None]) -> RunResult:
    try:
        simulate(world)
    except Exception as error:
        world.note([f"{type(error).__name__}: {error}", traceback.format_exc()])
    finally:
        world.end()
    return RunResult(world.seed, world.violations, world.trace[-LINES:])


def _with_faults(world: StoreWorld, steps: int) -> None:
    """Run users and faults for some steps.  Then all faults end, and all checks must pass."""
    world.create()
    faults = Faults(world)
    for _ in range(steps):
        for _ in range(world.random.choice((1, 2, 4))):
            world.begin_request()
        if world.random.random() < 0.4:
            faults.inject()
        world.run_for(world.random.choice(PAUSES_S))
        faults.end_due()
        if world.violations:
            return
    faults.heal()
    world.wait_healthy()
    if not world.violations and world.random.random() < SLOW_RUNS:
        world.slow_for_long()
    world.conclude()


def _with_elections(world: StoreWorld) -> None:
    """Move leadership to a member, and cut it off from the others until they have elected another leader.

    Often its manager has not written the leader key before the cut, and tries to do so afterwards.
    """
    world.create()
    world.wait_healthy()
    for _ in range(ELECTIONS):
        leads = world.raft.current
        id = world.random.choice([id for id in world.ids if leads is None or id != leads.member.id])
        if world.raft.transfer(id):
            world.log(f"fault: leadership moves to {id}, which is cut off")
            world.run_for(world.random.uniform(0.0, CANDIDATE_POLL_S))
            cut = world.links.cut([id], [other for other in world.ids if other != id])
            world.begin_request()
            world.run_for(world.random.uniform(*ELECTED_S))
            world.links.restore(cut)
        world.run_for(world.random.choice(PAUSES_S))
        if world.violations:
            return
    world.wait_healthy()
    world.conclude()
