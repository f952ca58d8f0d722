"""A cluster with nothing to do computes little."""

from sim.cluster import SimulatedCluster

PERIOD_S = 60.0
WAKEUPS_PER_S_MAX = 4.0
"""It was 10 while each loop slept for its own period, and looked for disruptions that had not begun."""


def test_an_idle_manager_alone_wakes_rarely() -> None:
    with SimulatedCluster(managers=1, workers=0) as cluster:
        cluster.run_for(30.0)
        before = cluster.loop.wakeups
        cluster.run_for(PERIOD_S)
        assert (cluster.loop.wakeups - before) / PERIOD_S < WAKEUPS_PER_S_MAX
