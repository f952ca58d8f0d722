"""Shares of new connections: who gets them, and the weights of servers."""

from hypothesis import given
from hypothesis import strategies as st

from skep.model.networks.tables import TableEndpoint, TableService, TableSplit
from skep.model.staging.shares import WEIGHT_MAX, Shares, shares_of
from skep.model.values.ids import NodeId, ServiceId, TaskId


def a_service(percent: int | None, *versions: int) -> TableService:
    split = TableSplit(percent, versions) if percent is not None else None
    return TableService(id=ServiceId("web"), name="web", split=split)


def tasks(*versions: int) -> tuple[TableEndpoint, ...]:
    return tuple(
        TableEndpoint(task_id=TaskId(f"t{number}"), node_id=NodeId("n1"), version=version)
        for number, version in enumerate(versions)
    )


def test_old_and_new_tasks_are_told_apart_by_their_versions() -> None:
    found = tasks(1, 2, 1, 3)
    assert shares_of(a_service(5, 2, 3), found) == Shares((found[0], found[2]), (found[1], found[3]), 5)
    assert shares_of(a_service(0, 2, 3), found) == Shares((found[0], found[2]))
    assert shares_of(a_service(100, 2, 3), found) == Shares((found[1], found[3]))
    assert shares_of(a_service(None), found) == shares_of(None, found) == Shares(found)


def test_while_only_one_side_serves_it_gets_everything() -> None:
    for percent in (0, 5, 100):
        assert shares_of(a_service(percent, 2), tasks(1, 1)) == Shares(tasks(1, 1))
        assert shares_of(a_service(percent, 2), tasks(2, 2)) == Shares(tasks(2, 2))
        assert shares_of(a_service(percent, 2), ()) == Shares(())


def test_withdrawn_tasks_get_connections_only_while_no_others_serve() -> None:
    service = TableService(id=ServiceId("web"), name="web", split=TableSplit(5, (4,), (2, 3)))
    found = tasks(1, 2, 3, 4)
    assert shares_of(service, found) == Shares(found[:1], found[3:], 5)
    assert shares_of(service, found[1:]) == Shares(found[3:])
    assert shares_of(service, found[1:3]) == Shares(found[1:3])


@given(st.integers(1, 99), st.integers(1, 50), st.integers(1, 50))
def test_weights_result_in_the_share_whatever_the_numbers_of_tasks(percent: int, old: int, new: int) -> None:
    shares = Shares(tasks(*[1] * old), tasks(*[2] * new), percent)
    of_old, of_new = shares.weights
    assert 1 <= min(of_old, of_new) <= max(of_old, of_new) <= WEIGHT_MAX
    wanted = percent * old / ((100 - percent) * new)
    if 1 / WEIGHT_MAX <= wanted <= WEIGHT_MAX:
        found = of_new * new / (of_new * new + of_old * old)
        assert abs(found - percent / 100) < 0.08, "the weights are whole numbers"
    if 0.1 <= wanted <= 10:
        assert abs(found - percent / 100) < 0.012


def test_a_share_of_five_percent_is_exact() -> None:
    assert Shares(tasks(*[1] * 10), tasks(2), 5).weights == (19, 10)
    assert Shares((), (), 0).weights == (1, 1)
