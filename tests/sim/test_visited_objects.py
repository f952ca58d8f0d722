"""How many objects the leader's loops look up for one event."""

from sim.seeds import report, results
from sim.visits import simulate


def test_an_event_of_a_node_or_a_task_costs_as_much_in_a_cluster_of_four_times_the_size() -> None:
    (result,) = results([1], simulate)
    assert not result.violations, report(result)
