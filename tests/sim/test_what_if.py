"""What ``skep what-if`` predicts is what happens: the change is made, nothing else changes, and the cluster rests."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from random import Random

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.users.random_specs import ZONE, ZONES, Dependencies, a_spec
from skep.api.formats.service_form import settled
from skep.errors import SkepError
from skep.manager.control.nodes import update_node
from skep.manager.control.services import update_service
from skep.manager.control.tasks import known_status
from skep.manager.diagnosis.reasons import problems_of
from skep.manager.services.disruption_budget import is_available
from skep.manager.what_if.answer import Question, SupposedOutcome
from skep.manager.what_if.rehearsal import Rehearsal
from skep.manager.what_if.suppositions import deploy, drain, lose
from skep.model.node import Availability, Node
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.service import ReplicatedService, Resources, Service, ServiceMode, ServiceSpec
from skep.model.task import Task
from skep.model.values.ids import NodeId
from skep.model.values.times import timestamp
from skep.store.interface import Transaction, View

NAMES = ("web", "api", "db", "mail", "queue", "cache")
QUICK, SEEDS = 8, 300
"""Seeds that run always, and all seeds."""
REST_S = 100.0
"""Seconds after the supposed end, because nodes and managers take longer here for some steps."""

Outcome = tuple[int, Mapping[str, int]]
"""Available tasks of a service, and the number of its other slots by the kind of their reason."""


def outcome(view: View, service: Service) -> Outcome:
    """Return how the service really is."""
    tasks = view.find(Task, service_id=service.id)
    nodes = {node.id: node for node in view.find(Node)}
    available = sum(is_available(task, nodes.get(task.node_id)) for task in tasks)
    known = [replace(task, status=known_status(view, task)) if task.is_active else task for task in tasks]
    problems = problems_of(service, known, nodes, wanted=0, now_ns=0)
    return available, Counter(one.kind for one in problems)


def outcomes(view: View) -> dict[str, Outcome]:
    return {one.id: outcome(view, one) for one in view.find(Service)}


def predicted(answer: SupposedOutcome) -> dict[str, Outcome]:
    """Return how the services are that differ, according to ``answer``."""
    found: dict[str, Outcome] = {}
    for one in answer.services:
        kinds = Counter[str]()
        for each in one.missing:
            kinds[each.kind] += each.tasks
        found[one.id] = one.after, kinds
    return found


def some_specs(random: Random) -> Iterator[ServiceSpec]:
    """Yield specs of services that run until they are stopped."""
    names = random.sample(NAMES, random.randint(2, len(NAMES)))
    while names:
        spec = a_spec(names[0], random, Dependencies(services=tuple(names)), random)
        if spec.mode.name in ("replicated", "global") and AUTOSCALE not in spec.labels:
            names.pop(0)
            yield spec


def ask(view: View, suppose: Callable[[Rehearsal], None]) -> tuple[SupposedOutcome, float]:
    """Return the answer, and the time in seconds after which nothing happens any more."""
    question = Question(Rehearsal(view, 0), lambda _: True)
    for _ in question.begin():
        pass
    suppose(question.rehearsal)
    for _ in question.settle():
        pass
    return question.answer, question.rehearsal.clock.monotonic()


def drain_really(tx: Transaction, id: NodeId) -> None:
    node = tx.get(Node, id)
    update_node(tx, id, replace(node.spec, availability=Availability.DRAIN), node.version.index)


def scale_really(tx: Transaction, spec: ServiceSpec) -> None:
    service = tx.get(Service, spec.name)
    update_service(tx, service.id, settled(spec), service.version.index, now=timestamp(0))


class Change:
    """A random change: nodes that are lost or drained, or a service with another number of tasks."""

    def __init__(self, cluster: SimulatedCluster, random: Random) -> None:
        self._cluster = cluster
        self._nodes = random.sample(cluster.workers, random.choice((1, 1, 2)))
        replicated = [one.spec for one in cluster.view.find(Service) if one.spec.mode.name == "replicated"]
        kinds = ("lose", "lose", "drain", "scale") if replicated else ("lose", "drain")
        self._kind = random.choice(kinds)
        if replicated:
            mode = ServiceMode(replicated=ReplicatedService(replicas=random.randint(0, 9)))
            self._spec = replace(random.choice(replicated), mode=mode)

    def suppose(self, rehearsal: Rehearsal) -> None:
        match self._kind:
            case "lose":
                lose(rehearsal, self._nodes)
            case "drain":
                drain(rehearsal, self._nodes)
            case "scale":
                deploy(rehearsal, self._spec)

    def make(self) -> None:
        match self._kind:
            case "lose":
                for id in self._nodes:
                    self._cluster.kill_node(id)
            case "drain":
                for id in self._nodes:
                    self._cluster.write(partial(drain_really, id=id))
            case "scale":
                self._cluster.write(partial(scale_really, spec=self._spec))


@pytest.mark.parametrize(
    "seed",
    [*range(QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, SEEDS))],
)
def test_what_is_predicted_happens(seed: int) -> None:
    """The services with missing tasks are as predicted, with the numbers of their tasks and the kinds of reasons."""
    random = Random(seed)
    workers = random.randint(2, 6)
    capacity = Resources(nano_cpus=4_000_000_000, memory_bytes=random.choice((1, 2, 8)) << 30)
    with SimulatedCluster(managers=3, workers=workers, seed=seed, capacity=capacity) as cluster:
        for id in cluster.workers:
            cluster.label(id, **{ZONE: random.choice(ZONES)})
        for spec in some_specs(random):
            with suppress(SkepError):  # its port or its rules conflict with an earlier service
                cluster.create(spec)
        cluster.run_for(random.choice((0.3, 2.0, 40.0)))
        change = Change(cluster, random)
        before = outcomes(cluster.view)
        answer, settled_s = ask(cluster.view, change.suppose)
        change.make()
        cluster.run_for(settled_s + REST_S)
        assert outcomes(cluster.view) == {**before, **predicted(answer)}
