"""Nodes in order of preference, however often they change."""

from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.ranking import STALE_MAX, Ranking, rank_of
from tests.support.builders import a_node


def test_a_node_that_changes_again_and_again_and_never_comes_first_takes_no_more_room() -> None:
    accounting = Accounting()
    ids = ("best", "worst")
    for id in ids:
        accounting.set_node(a_node(id))
    ranking = Ranking(lambda account: (account.node.id,), None)
    for id in ids:
        ranking.enter(accounting.accounts[a_node(id).id])
    for _ in range(10 * STALE_MAX):
        ranking.enter(accounting.accounts[a_node("worst").id])
    assert len(ranking.heap) <= STALE_MAX + 2 * len(ids) + 1
    first = ranking.first()
    assert first is not None
    assert rank_of(first) == ("best",)
