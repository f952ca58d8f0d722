"""How tasks of many services fill nodes of different sizes, and the branches of a preference."""

from random import Random

import pytest

from skep.manager.scheduler.nodes import candidates as candidates_module
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import place
from skep.model.service import Resources
from skep.model.task import TaskState
from tests.support.builders import a_node, a_service, a_task

GIB = 1 << 30


def largest_difference_of_fill() -> float:
    """Two sizes of node, 300 services of one task: the largest difference of the nodes' reserved shares."""
    books = Accounting()
    for number in range(10):
        books.set_node(a_node(f"small{number}", has=Resources(memory_bytes=8 * GIB)))
        books.set_node(a_node(f"large{number}", has=Resources(memory_bytes=32 * GIB)))
    choices = CachedSpreads(books)
    random = Random(1)
    for number in range(300):
        service = a_service(f"s{number}", reserve=Resources(memory_bytes=random.randint(1, 8) * GIB // 10))
        task = a_task(service=service, state=TaskState.PENDING)
        place([task], requirements_of(task, service.spec), choices, now=0.0, limit=1)
    shares = [
        1 - account.free_memory_bytes / account.node.description.resources.memory_bytes
        for account in books.accounts.values()
    ]
    return max(shares) - min(shares)


def test_two_sizes_of_node_end_within_ten_percent_of_each_other() -> None:
    assert largest_difference_of_fill() < 0.10


def test_a_count_of_tasks_alone_would_fill_small_nodes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module, "fill", lambda requirements, account: 0.0)
    assert largest_difference_of_fill() > 0.10


def test_services_of_one_task_use_all_branches_of_a_preference() -> None:
    books = Accounting()
    for number in range(6):
        books.set_node(a_node(f"n{number}", labels={"zone": f"z{number % 3}"}))
    choices = CachedSpreads(books)
    counts = dict.fromkeys("012", 0)
    for number in range(30):
        service = a_service(f"s{number}", spread=("node.labels.zone",))
        task = a_task(service=service, state=TaskState.PENDING)
        (assignment,) = place(
            [task], requirements_of(task, service.spec), choices, now=0.0, limit=1
        ).assignments
        counts[str(int(assignment.node_id[1:]) % 3)] += 1
    assert set(counts.values()) == {10}
