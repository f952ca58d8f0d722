"""Nodes that come and go, leaders that crash while they send, and a receiver that often fails: each incident is told.

The receiver keeps each message once by its id.
"""

import pytest

from sim.cluster import SimulatedCluster
from sim.faults.damping import pass_time
from sim.users.receivers import TARGET, Receiver
from skep.manager.notify.records import Incident, incidents_in
from skep.manager.notify.writing import add_target
from skep.store.interface import Transaction
from skep.store.level import NOTIFICATIONS
from tests.support.builders import a_service_spec

pytestmark = pytest.mark.timeout(180)  # everything is computed, in 19 s beside other tests

STEPS = 16


def add(tx: Transaction) -> None:
    add_target(tx, TARGET)


def disturb(cluster: SimulatedCluster, receiver: Receiver, step: int) -> None:
    """Take a node away or back, or end the leader, half of the times while it sends.  It then comes back."""
    away = [id for id in cluster.workers if not cluster.is_ready(id)]
    match cluster.random.choice(("node", "crash", "depose")):
        case "node" if away and step % 2:
            cluster.start_all()
        case "node":
            cluster.kill_node(cluster.random.choice([id for id in cluster.workers if id not in away] or away))
        case "crash":
            for _ in range(cluster.random.choice((0, 200))):
                if receiver.in_doubt:
                    break
                cluster.run_for(0.5)
            id = cluster.leader
            cluster.crash(id)
            pass_time(cluster, 20.0)
            cluster.start_manager(id)
        case _:
            cluster.depose(quietly=step % 2 == 0)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_every_incident_is_told_once_whoever_leads(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        violations: list[str] = []
        receiver = Receiver(cluster.random, violations.extend)
        cluster.network.receive_notification = receiver.notify
        cluster.run_until(lambda: cluster.view.level >= NOTIFICATIONS, within_s=120)
        cluster.write(add)
        cluster.create(a_service_spec(replicas=3))
        seen: dict[str, Incident] = {}

        def wait(seconds: float) -> None:
            for _ in range(round(seconds / 5)):
                pass_time(cluster, 5.0)
                seen.update({one.id: one for one in incidents_in(cluster.view).values()})

        for step in range(STEPS):
            disturb(cluster, receiver, step)
            wait(cluster.random.uniform(5.0, 90.0))
        cluster.start_all()
        wait(1800.0)
        assert violations == [], "nothing is told twice, and a copy says the same"
        assert incidents_in(cluster.view) == {}
        assert seen, "something has happened"
        began, ended = receiver.told("began"), receiver.told("ended")
        assert set(seen) <= set(began), "nothing is lost"
        assert began.keys() == ended.keys()
