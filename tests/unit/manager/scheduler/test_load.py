"""What the measured load of nodes does to the choice among those that are alike."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.scheduler.nodes import candidates as candidates_module
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.load import LOAD_MAX, MeanLoad, effective_tasks, used_share
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import place
from skep.model.node import Node
from skep.model.service import Resources
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from tests.support.builders import a_docker_node, a_node, a_service, a_task

GIB = 1 << 30
LOADS = st.floats(0, 1)


def loaded(id: str, load: float | None, memory: int = 8 * GIB) -> Node:
    return replace(a_node(id, has=Resources(nano_cpus=4_000_000_000, memory_bytes=memory)), load=load)


def accounting_of(*nodes: Node) -> Accounting:
    books = Accounting()
    for node in nodes:
        books.set_node(node)
    return books


def placed(
    books: Accounting, services: int, *, first: int = 0, replicas: int = 1, memory: int = 0
) -> Counter[str]:
    """How many tasks of new services each node got, as one burst between two reports of load."""
    choices, counts = CachedSpreads(books), Counter[str]()
    for number in range(first, first + services):
        service = a_service(f"s{number}", reserve=Resources(memory_bytes=memory))
        tasks = [a_task(slot=n + 1, service=service, state=TaskState.PENDING) for n in range(replicas)]
        requirements = requirements_of(tasks[0], service.spec)
        found = place(tasks, requirements, choices, now=0.0, limit=replicas).assignments
        counts.update(one.node_id for one in found)
    return counts


def test_a_node_that_is_half_busy_gets_half_as_many_and_a_burst_spreads() -> None:
    books = accounting_of(loaded("a", 0.0), loaded("b", 0.5), loaded("c", 0.0), loaded("d", 0.5))
    assert placed(books, 60) == {"a": 20, "b": 10, "c": 20, "d": 10}


def test_what_is_reserved_shares_what_the_load_leaves() -> None:
    """Of 8 GiB in all each has the same part left of what it can give: (1 - 2/3) * 1 = (1 - 1/3) * 0.5."""
    books = accounting_of(loaded("a", 0.0), loaded("b", 0.5))
    counts = placed(books, 200, memory=GIB // 25)
    assert counts["a"] == pytest.approx(200 * 2 / 3, abs=1)


def test_replicas_of_one_service_spread_over_all_nodes_and_the_busy_one_comes_last() -> None:
    books = accounting_of(loaded("a", 0.8), loaded("b", 0.1), loaded("c", 0.2))
    assert placed(books, 1, replicas=2) == {"b": 1, "c": 1}
    assert placed(books, 1, first=1, replicas=3) == {"a": 1, "b": 1, "c": 1}


def test_without_loads_only_the_number_of_tasks_counts() -> None:
    books = accounting_of(loaded("a", None), loaded("b", None), loaded("c", None))
    assert placed(books, 30) == {"a": 10, "b": 10, "c": 10}


def test_a_fully_busy_node_still_gets_its_tenth() -> None:
    books = accounting_of(loaded("a", 0.0), loaded("b", 1.0))
    counts = placed(books, 110)
    assert counts == {"a": 100, "b": 10}


def test_a_node_without_a_load_counts_as_the_mean_of_the_others() -> None:
    books = accounting_of(loaded("a", 0.2), loaded("b", 0.6), a_docker_node("d1"))
    counts = placed(books, 60)
    assert counts["b"] < counts["d1"] < counts["a"]
    books.set_node(loaded("a", 0.6))
    assert books.accounts[NodeId("d1")].load == 0.6
    books.remove_node(NodeId("a"))
    books.remove_node(NodeId("b"))
    assert books.accounts[NodeId("d1")].load == 0.0


def test_a_load_that_changes_counts_for_the_next_task() -> None:
    books = accounting_of(loaded("a", 0.0), loaded("b", 0.0))
    choices = CachedSpreads(books)

    def next_node(number: int) -> str:
        service = a_service(f"n{number}")
        task = a_task(service=service, state=TaskState.PENDING)
        (one,) = place([task], requirements_of(task, service.spec), choices, now=0.0, limit=1).assignments
        return one.node_id

    assert next_node(1) == "a"
    books.set_node(loaded("b", 0.8))
    assert [next_node(2), next_node(3)] == ["a", "a"]
    books.set_node(loaded("b", 0.0))
    assert [next_node(4), next_node(5), next_node(6)] == ["b", "b", "b"]


@given(st.integers(1, 1000), LOADS, LOADS)
def test_crowding_grows_with_tasks_and_with_load(tasks: int, load: float, other: float) -> None:
    assert effective_tasks(tasks, 0.0) == tasks
    assert effective_tasks(tasks, load) < effective_tasks(tasks + 1, load)
    least, most = sorted((load, other))
    assert effective_tasks(tasks, least) <= effective_tasks(tasks, most) <= tasks / (1 - LOAD_MAX)


@given(LOADS, LOADS, LOADS)
def test_what_is_filled_grows_with_both_and_stays_a_share(share: float, other: float, load: float) -> None:
    assert used_share(share, 0.0) == share
    least, most = sorted((share, other))
    assert 0 <= used_share(least, load) <= used_share(most, load) <= 1
    assert used_share(share, load) >= share - 1e-12


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | LOADS), max_size=30))
def test_the_mean_does_not_depend_on_what_came_before(changes: list[tuple[str, float | None]]) -> None:
    mean, last = MeanLoad(), dict(changes)
    for id, load in changes:
        mean.set(NodeId(id), load)
    fresh = MeanLoad()
    for id, load in sorted(last.items()):
        fresh.set(NodeId(id), load)
    assert mean.mean == fresh.mean
    assert 0 <= mean.mean <= 1


def alone(tasks: int, load: float) -> float:
    """A wrong twin: the least busy node takes everything until it reports again."""
    return load + tasks / 1e6


def unheard(tasks: int, load: float) -> float:
    """A wrong twin: what a node measures does not count."""
    return tasks


@pytest.mark.parametrize("twin", [alone, unheard])
def test_wrong_twins_are_rejected(twin: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module, "effective_tasks", twin)
    with pytest.raises(AssertionError):
        test_a_node_that_is_half_busy_gets_half_as_many_and_a_burst_spreads()
