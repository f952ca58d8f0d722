"""Choosing nodes step by step, beside a model that looks at everything anew for each task.

``History`` lives through random placements, ends, failures and changes of nodes.  Each property is a check over a
history or a cluster; each has a wrong twin of the production code, which some history must give away.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.time_slices import SlicedWork
from skep.manager.scheduler.nodes import accounting as accounting_module
from skep.manager.scheduler.nodes import candidates as candidates_module
from skep.manager.scheduler.nodes import ranking as ranking_module
from skep.manager.scheduler.nodes import spread as spread_module
from skep.manager.scheduler.nodes.accounting import Account, Accounting
from skep.manager.scheduler.nodes.candidates import fill, shape_of
from skep.manager.scheduler.nodes.filters import filters_for
from skep.manager.scheduler.nodes.requirements import Requirements, requirements_of
from skep.manager.scheduler.nodes.spread import MAX_FAILURES, CachedSpreads, failing_nodes
from skep.manager.scheduler.placement import Assignment, place
from skep.model.needs import ClusterMount, Holdings, host_ports
from skep.model.node import Availability, Node, NodeState
from skep.model.options.constraints import label_of
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    NamedResource,
    PortConfig,
    PublishMode,
    Resources,
    Service,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from tests.support.builders import a_node, a_service, a_task

GIB = 1 << 30
PORT = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
ONE_GPU = (GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=1)),)
NAMED = tuple(GenericResource(named_resource_spec=NamedResource(kind="gpu", value=name)) for name in "abc")
COUNTED = (GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=2)),)

SERVICES: list[Service] = [
    a_service("web"),
    a_service("api", spread=("node.labels.zone",)),
    a_service(
        "db", spread=("node.labels.zone", "node.labels.rack"), reserve=Resources(memory_bytes=GIB // 2)
    ),
    a_service("big", reserve=Resources(memory_bytes=GIB, nano_cpus=500_000_000)),
    a_service("disk", constraints=(" node.labels.disk  ==  ssd ",), reserve=Resources(nano_cpus=250_000_000)),
    a_service("edge", ports=(PORT,)),
    a_service("pair", max_replicas=2, constraints=("node.labels.zone!=a",)),
    a_service("model", reserve=Resources(generic_resources=ONE_GPU)),
]


def random_node(random: Random, id: str) -> Node:
    node = a_node(
        id,
        labels={
            "zone": random.choice("abc"),
            "rack": random.choice("xy"),
            "disk": random.choice(("ssd", "hdd")),
        },
        state=random.choice((NodeState.READY,) * 5 + (NodeState.DOWN,)),
        availability=random.choice((Availability.ACTIVE,) * 5 + (Availability.DRAIN,)),
        has=Resources(
            nano_cpus=random.choice((1, 2, 4)) * 1_000_000_000,
            memory_bytes=random.choice((1, 2, 4)) * GIB,
            generic_resources=random.choice(((), NAMED, COUNTED)),
        ),
    )
    return replace(node, load=random.choice((None, None, 0.0, 0.3, 0.5, 1.0)))


class History:
    """A cluster's life as the scheduler sees it, from one seed."""

    def __init__(self, seed: int, books: type[Accounting] = Accounting) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.accounting = books()
        self.choices = CachedSpreads(self.accounting)
        self.nodes: dict[str, Node] = {}
        self.tasks: dict[str, Task] = {}
        for number in range(self.random.randint(1, 8)):
            self._set_node(f"n{number}")

    def steps(self) -> Iterator[tuple[Requirements, list[Task], bool]]:
        """Tasks to place, one group after another; in between things happen."""
        for _ in range(25):
            for _ in range(self.random.randint(0, 3)):
                self._something_happens()
            service = self.random.choice(SERVICES)
            count = self.random.randint(1, 6)
            tasks = [a_task(slot=n + 1, service=service, state=TaskState.PENDING) for n in range(count)]
            yield requirements_of(tasks[0], service.spec), tasks, self.random.random() < 0.5

    def keep(self, assignment: Assignment) -> None:
        self.tasks[assignment.task.id] = replace(
            assignment.task,
            node_id=assignment.node_id,
            generic_resources=assignment.generic_resources,
            status=replace(assignment.task.status, state=TaskState.ASSIGNED),
        )

    def _set_node(self, id: str) -> None:
        self.nodes[id] = random_node(self.random, id)
        self.accounting.set_node(self.nodes[id])

    def _something_happens(self) -> None:
        self.now += self.random.choice((0.0, 1.0, 200.0))
        match self.random.randrange(6):
            case 5 if self.nodes:
                id = self.random.choice(sorted(self.nodes))
                self.nodes[id] = replace(self.nodes[id], load=self.random.choice((None, 0.0, 0.4, 0.8)))
                self.accounting.set_node(self.nodes[id])
            case 0:
                self._set_node(f"n{self.random.randrange(10)}")
            case 1 if self.nodes:
                id = self.random.choice(sorted(self.nodes))
                del self.nodes[id]
                self.accounting.remove_node(NodeId(id))
            case 2 if self.tasks:
                for id in self.random.sample(sorted(self.tasks), self.random.randint(1, len(self.tasks))):
                    self.accounting.remove(self.tasks.pop(id).id)
            case 3 if self.tasks:
                id = self.random.choice(sorted(self.tasks))
                retired = self.tasks[id] = replace(self.tasks[id], desired_state=TaskState.SHUTDOWN)
                self.accounting.add(retired, ports_of(retired))
            case 4 if self.tasks:
                task = self.tasks[self.random.choice(sorted(self.tasks))]
                for _ in range(MAX_FAILURES):
                    self.accounting.record_failure(task, self.now)


def ports_of(task: Task) -> tuple[tuple[str, int], ...]:
    (service,) = (one for one in SERVICES if one.id == task.service_id)
    return host_ports(service.spec)


# -- the model ---------------------------------------------------------------------------------------------------------


def model_choice(requirements: Requirements, books: Accounting, now: float) -> str | None:
    """The node for the next task, found by looking at all of them."""
    failing = failing_nodes(books, requirements, now)
    copies = books.copies(requirements.service_id)
    accounts = list(books.accounts.values())
    tenths = [round(10 * account.node.load) for account in accounts if account.node.load is not None]
    neutral = round(sum(tenths) / len(tenths)) / 10 if tenths else 0.0

    def rank(account: Account) -> tuple[object, ...]:
        id = account.node.id
        load = account.node.load if account.node.load is not None else neutral
        free = 1 - min(load, 0.9)
        share = (
            1 - (1 - fill(requirements, account)) * free
            if requirements.nano_cpus or requirements.memory_bytes
            else 0.0
        )
        return failing.get(id, 0), copies[id], share, (account.active + 1) / free, id

    def best(among: list[Account], levels: tuple[str, ...]) -> tuple[object, ...] | None:
        if not levels:
            able = [
                account
                for account in among
                if all(
                    one.passes(requirements, account, copies[account.node.id])
                    for one in filters_for(requirements)
                )
            ]
            return min(map(rank, able), default=None)
        branches: dict[str, list[Account]] = {}
        for account in among:
            branches.setdefault(label_of(account.node, levels[0]) or "", []).append(account)
        found = []
        for branch in branches.values():
            first = best(branch, levels[1:])
            if first is not None:
                found.append((sum(copies[account.node.id] for account in branch), first))
        return min(found)[1] if found else None

    first = best(accounts, requirements.spread_over)
    return str(first[-1]) if first is not None else None


def check_every_choice_is_the_models(seed: int, books: type[Accounting] = Accounting) -> None:
    history = History(seed, books)
    for requirements, tasks, is_alone in history.steps():
        for task in tasks:
            is_last = is_alone
            expected = model_choice(requirements, history.accounting, history.now)
            asked = requirements
            if is_last and history.choices.is_first(requirements, history.now):
                # As the loop does, with the first tasks of all services.
                asked, is_last = shape_of(requirements), False
            placed = place([task], asked, history.choices, now=history.now, limit=1, is_last=is_last)
            assert [one.node_id for one in placed.assignments] == ([expected] if expected is not None else [])
            for assignment in placed.assignments:
                history.keep(assignment)


def check_a_batch_is_its_tasks_one_by_one(seed: int) -> None:
    together, alone = History(seed), History(seed)
    for (requirements, tasks, is_last), (others_need, others, _) in zip(
        together.steps(), alone.steps(), strict=True
    ):
        batch = place(
            tasks, requirements, together.choices, now=together.now, limit=len(tasks), is_last=is_last
        )
        fresh = [
            place([task], others_need, CachedSpreads(alone.accounting), now=alone.now, limit=1).assignments
            for task in others
        ]
        assert [one.node_id for one in batch.assignments] == [one.node_id for some in fresh for one in some]
        for one, (other,) in zip(batch.assignments, filter(None, fresh), strict=True):
            together.keep(one)
            alone.keep(replace(other, task=replace(other.task, id=one.task.id)))
            alone.accounting.remove(other.task.id)
            alone.accounting.add(alone.tasks[one.task.id], others_need.host_ports)


def check_a_new_leader_arrives_at_the_same_figures_and_no_node_is_over_committed(seed: int) -> None:
    history = History(seed)
    for requirements, tasks, is_last in history.steps():
        shrunk_before = {id for id, account in history.accounting.accounts.items() if is_over(account)}
        placed = place(tasks, requirements, history.choices, now=history.now, limit=4, is_last=is_last)
        for assignment in placed.assignments:
            history.keep(assignment)
        anew = Accounting()
        for task in sorted(history.tasks.values(), key=lambda task: task.id):
            anew.add(task, ports_of(task))
        for node in history.nodes.values():
            anew.set_node(node)
        assert figures(anew) == figures(history.accounting)
        over = {id for id, account in anew.accounts.items() if is_over(account)}
        assert over <= shrunk_before


def check_asking_again_changes_nothing(seed: int) -> None:
    history = History(seed)
    for requirements, tasks, is_last in history.steps():
        placed = place(
            tasks, requirements, history.choices, now=history.now, limit=len(tasks), is_last=is_last
        )
        for assignment in placed.assignments:
            history.keep(assignment)
        if placed.refusals:
            refused = [refusal.task for refusal in placed.refusals]
            before = figures(history.accounting)
            again = place(
                refused, requirements, history.choices, now=history.now, limit=len(refused), is_last=is_last
            )
            assert again.assignments == ()
            assert again.refusals == placed.refusals
            assert figures(history.accounting) == before


def check_the_order_of_nodes_does_not_matter(seed: int) -> None:
    random = Random(seed)
    nodes = [random_node(random, f"n{number}") for number in range(random.randint(1, 8))]
    service = random.choice(SERVICES)
    tasks = [a_task(slot=n + 1, service=service, state=TaskState.PENDING) for n in range(8)]
    results = []
    for some in (nodes, nodes[::-1], random.sample(nodes, len(nodes))):
        books = Accounting()
        for node in some:
            books.set_node(node)
        requirements = requirements_of(tasks[0], service.spec)
        placed = place(tasks, requirements, CachedSpreads(books), now=0.0, limit=len(tasks))
        results.append([(one.task.id, one.node_id, one.generic_resources) for one in placed.assignments])
    assert results[0] == results[1] == results[2]


def figures(books: Accounting) -> dict[str, object]:
    return {
        id: (
            account.active,
            account.load,
            account.free_nano_cpus,
            account.free_memory_bytes,
            {port: number for port, number in account.host_ports.items() if number},
            {kind: sorted(names) for kind, names in account.generic._names.items() if names},
            dict(account.generic.counts),
        )
        for id, account in books.accounts.items()
    }


def is_over(account: Account) -> bool:
    return (
        account.free_nano_cpus < 0
        or account.free_memory_bytes < 0
        or any(count > 1 for count in account.host_ports.values())
        or any(count < 0 for count in account.generic.counts.values())
    )


CHECKS: list[Callable[[int], None]] = [
    check_every_choice_is_the_models,
    check_a_batch_is_its_tasks_one_by_one,
    check_a_new_leader_arrives_at_the_same_figures_and_no_node_is_over_committed,
    check_asking_again_changes_nothing,
    check_the_order_of_nodes_does_not_matter,
]


@pytest.mark.parametrize("check", CHECKS)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_properties_of_choices(check: Callable[[int], None], seed: int) -> None:
    check(seed)


@pytest.mark.parametrize("check", CHECKS)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_properties_of_choices_of_services_on_many_nodes(check: Callable[[int], None], seed: int) -> None:
    """Two nodes are many, and it pauses after each node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread_module, "STEP", 1)
        patch.setattr(ranking_module, "CHECKED_MAX", 1)
        check(seed)


# -- wrong twins -------------------------------------------------------------------------------------------------------


class Forgetful(Accounting):
    """What became better is not noticed."""

    def changed_since(self, changes: int, mounts: Sequence[ClusterMount] = ()) -> Collection[NodeId]:
        return list(self.accounts)[:1]


class Deaf(Accounting):
    """The reported load of nodes is ignored."""

    def _set_load(self, node_id: NodeId, load: float | None) -> None:
        pass


def unsorted(patch: pytest.MonkeyPatch) -> None:
    """A node keeps the rank it was entered with."""

    def first(ranking: ranking_module.Ranking) -> ranking_module.Entry | None:
        able = (entry for entry in ranking.heap if ranking.fits is None or ranking.fits(entry[-1]))
        return next(able, None)

    patch.setattr(ranking_module.Ranking, "first", first)


def unlimited(patch: pytest.MonkeyPatch) -> None:
    """Once a node will do, it will do for ever."""
    patch.setattr(candidates_module.Candidates, "has_capacity", lambda candidates, account, copies: True)


def keeping_aside(patch: pytest.MonkeyPatch) -> None:
    """Nodes that one service passed over are lost for the others."""
    patch.setattr(spread_module._Leaf, "put_back", lambda leaf: leaf._aside.clear())


def by_arrival(patch: pytest.MonkeyPatch) -> None:
    """Among equals the node that was added first is taken."""

    def rank(candidates: candidates_module.Candidates, account: Account) -> tuple[object, ...]:
        return account.active, account.load, list(candidates.accounting.accounts).index(account.node.id)

    patch.setattr(candidates_module.Candidates, "rank", rank)


def shy(patch: pytest.MonkeyPatch) -> None:
    """A node takes one task at a time."""
    real = spread_module.Spread.choosing
    served: set[tuple[int, str]] = set()

    def once(spread: spread_module.Spread) -> SlicedWork[Account | None]:
        account = yield from real(spread)
        if account is None or (id(spread), account.node.id) in served:
            return None
        served.add((id(spread), account.node.id))
        return account

    patch.setattr(spread_module.Spread, "choosing", once)


def inventive(patch: pytest.MonkeyPatch) -> None:
    """What a task gives back is free, whether the node still has it or not."""
    real = accounting_module.Account.remove

    def remove(account: Account, usage: Holdings) -> None:
        real(account, usage)
        account.generic.give_back(usage.generic)
        patch.setattr(account, "update", lambda node, held: None)

    patch.setattr(accounting_module.Account, "remove", remove)


@pytest.mark.parametrize(
    ("twin", "check"),
    [
        (unsorted, check_every_choice_is_the_models),
        (keeping_aside, check_a_batch_is_its_tasks_one_by_one),
        (unlimited, check_a_new_leader_arrives_at_the_same_figures_and_no_node_is_over_committed),
        (inventive, check_a_new_leader_arrives_at_the_same_figures_and_no_node_is_over_committed),
        (shy, check_asking_again_changes_nothing),
        (by_arrival, check_the_order_of_nodes_does_not_matter),
    ],
)
def test_a_wrong_twin_is_rejected(
    twin: Callable[[pytest.MonkeyPatch], None], check: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    twin(monkeypatch)
    reject(check, twin.__doc__)


@pytest.mark.parametrize("books", [Forgetful, Deaf])
def test_wrong_books_are_rejected(books: type[Accounting]) -> None:
    reject(partial(check_every_choice_is_the_models, books=books), books.__doc__)


def reject(check: Callable[[int], None], twin: str | None) -> None:
    for seed in range(300):
        try:
            check(seed)
        except AssertionError:
            return
    pytest.fail(f"not noticed: {twin}")
