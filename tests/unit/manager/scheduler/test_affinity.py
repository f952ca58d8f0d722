"""Affinity and anti-affinity between services, and the largest skew: which node a task gets, or why none."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.time_slices import run_at_once
from skep.errors import InvalidArgument
from skep.manager.scheduler.explaining.explain import verdict, with_shown_names
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.filters import first_refusing
from skep.manager.scheduler.nodes.requirements import Requirements, requirements_of
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import Placed, place, placing_slots
from skep.model.node import Node
from skep.model.options.affinity import (
    AFFINITY,
    AFFINITY_PREFERRED,
    ANTI_AFFINITY,
    ANTI_AFFINITY_PREFERRED,
    MAX_SKEW,
    parsed_affinities,
)
from skep.model.service import Resources, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.store.state import State
from tests.support.builders import a_node, a_service, a_task

ZONE = "node.labels.zone"


def nodes(*zones: str) -> list[Node]:
    """``n1`` and so on, one for each zone.  An empty zone: a node without the label."""
    return [
        a_node(f"n{number}", labels={"zone": zone} if zone else {}) for number, zone in enumerate(zones, 1)
    ]


class Cluster:
    """Places tasks of services one service after the other."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.accounting = Accounting()
        self.choices = CachedSpreads(self.accounting)
        self.placed: dict[str, Counter[str]] = {}
        for node in nodes:
            self.accounting.set_node(node)

    def service(self, name: str, labels: Mapping[str, str] | None = None, **requested: object) -> Service:
        service = a_service(name, **requested)  # type: ignore[arg-type]
        service = replace(service, spec=replace(service.spec, labels=labels or {}))
        self.accounting.affinities.set(service)
        return service

    def requirements(self, service: Service) -> Requirements:
        task = a_task(service=service, state=TaskState.PENDING)
        return requirements_of(task, service.spec, (), self.accounting.affinities.of(service.id))

    def place(self, service: Service, count: int, leaving: Mapping[NodeId, int] | None = None) -> Placed:
        tasks = [a_task(slot=slot + 1, service=service, state=TaskState.PENDING) for slot in range(count)]
        result = place(
            tasks, self.requirements(service), self.choices, now=0.0, limit=count, leaving=leaving or {}
        )
        counts = Counter(str(one.node_id) for one in result.assignments)
        self.placed.setdefault(service.spec.name, Counter()).update(counts)
        return result

    def on(self, name: str) -> dict[str, int]:
        return dict(sorted(self.placed[name].items()))

    def reasons(self, service: Service) -> dict[str, tuple[str, ...]]:
        wanted = self.requirements(service)
        copies = self.accounting.copies(service.id)
        return {
            str(id): verdict(wanted, account, copies[id]).reasons
            for id, account in self.accounting.accounts.items()
        }


def test_tasks_run_only_where_the_other_service_runs() -> None:
    cluster = Cluster(nodes("a", "a", "b", "b"))
    cluster.place(cluster.service("db"), 2)
    placed = cluster.place(cluster.service("web", {AFFINITY: "DB"}), 4)
    assert {one.record.partition("|")[0] for one in placed.assignments} == {"4/4,RULES"}
    assert cluster.on("db") == {"n1": 1, "n2": 1}
    assert cluster.on("web") == {"n1": 2, "n2": 2}


def test_a_task_waits_for_the_service_that_it_has_to_be_near() -> None:
    cluster = Cluster(nodes("a", "b"))
    web = cluster.service("web", {AFFINITY: f"db@{ZONE}"})
    (refusal,) = cluster.place(web, 1).refusals
    assert refusal.reason == "no suitable node (affinity not satisfied on 2 nodes)"
    assert cluster.reasons(web)["n1"] == ("affinity: service db does not exist",)
    db = cluster.service("db", constraints=("node.hostname == n2",))
    assert cluster.reasons(web)["n1"] == (f"affinity: no task of db in {ZONE} a",)
    assert cluster.accounting.affinities.followers({db.id, web.id}) == {web.id}
    assert not cluster.accounting.affinities.followers({web.id})
    cluster.place(db, 1)
    cluster.place(web, 3)
    assert cluster.on("web") == {"n2": 3}


def test_a_new_task_may_help_a_slot_of_its_own_service_that_exceeds_the_largest_skew() -> None:
    cluster = Cluster(nodes("a", "b"))
    even, other = cluster.service("even", {MAX_SKEW: f"1@{ZONE}"}), cluster.service("other")
    assert cluster.accounting.affinities.followers({even.id, other.id}) == {even.id}


def test_tasks_near_a_service_by_zone_spread_within_its_zones() -> None:
    cluster = Cluster(nodes("a", "a", "b", "b", ""))
    cluster.place(cluster.service("db", constraints=("node.id == n1",)), 1)
    cluster.place(cluster.service("web", {AFFINITY: f"db@{ZONE}"}), 4)
    assert cluster.on("web") == {"n1": 2, "n2": 2}


def test_tasks_stay_apart_in_both_directions() -> None:
    cluster = Cluster(nodes("a", "a", "b"))
    web = cluster.service("web", constraints=("node.hostname != n3",))
    batch = cluster.service("batch", {ANTI_AFFINITY: "web"})
    cluster.place(web, 1)
    cluster.place(batch, 4)
    assert cluster.on("batch") == {"n2": 2, "n3": 2}
    cluster.place(web, 3)
    assert cluster.on("web") == {"n1": 4}
    assert cluster.reasons(web)["n2"] == ("anti-affinity: a task of batch on the node (a label of batch)",)
    assert cluster.reasons(batch)["n1"] == ("anti-affinity: a task of web on the node",)
    view = State()
    view.table_by_type[Service].store(batch.id, None, batch, moves=True)
    shown = with_shown_names(cluster.requirements(web), view, lambda _: "services of other stacks")
    assert [one.text for one in shown.rules.hard] == ["services of other stacks"]
    assert with_shown_names(cluster.requirements(batch), view, lambda _: "others").rules.hard[0].name == "web"


def test_tasks_stay_apart_by_zone_and_nodes_without_a_zone_are_apart_from_all() -> None:
    cluster = Cluster(nodes("a", "a", "b", ""))
    cluster.place(cluster.service("web", constraints=("node.id == n1",)), 1)
    batch = cluster.service("batch", {ANTI_AFFINITY: f"web@{ZONE}"})
    cluster.place(batch, 4)
    assert cluster.on("batch") == {"n3": 2, "n4": 2}
    assert cluster.reasons(batch)["n2"] == (f"anti-affinity: a task of web in {ZONE} a",)


def test_one_task_per_zone() -> None:
    cluster = Cluster(nodes("a", "a", "b", "b"))
    web = cluster.service("web", {ANTI_AFFINITY: f"web@{ZONE}"})
    result = cluster.place(web, 3)
    assert len(result.refusals) == 1
    assert result.refusals[0].reason == "no suitable node (anti-affinity not satisfied on 4 nodes)"
    assert set(cluster.on("web")) == {"n1", "n3"}


def test_all_tasks_in_the_zone_or_on_the_node_of_the_first() -> None:
    for topology, wanted in ((f"@{ZONE}", {"n1": 3, "n2": 3}), ("", {"n1": 6})):
        cluster = Cluster(nodes("a", "a", "b", "b"))
        cluster.place(cluster.service("web", {AFFINITY: f"web{topology}"}), 6)
        assert cluster.on("web") == wanted


def test_preferred_affinity_prefers_and_gives_way() -> None:
    small = [
        replace(one, description=replace(one.description, resources=Resources(nano_cpus=2)))
        for one in nodes("a", "a", "b")
    ]
    one_cpu = Resources(nano_cpus=1)
    cluster = Cluster(small)
    cluster.place(cluster.service("db", constraints=("node.id == n2",)), 1)
    cluster.place(cluster.service("web", {AFFINITY_PREFERRED: "db"}, reserve=one_cpu), 3)
    assert cluster.on("web") in ({"n1": 1, "n2": 2}, {"n2": 2, "n3": 1})
    cluster = Cluster(small)
    cluster.place(cluster.service("db", constraints=("node.id == n3",)), 1)
    cluster.place(cluster.service("web", {AFFINITY_PREFERRED: f"db@{ZONE}"}, reserve=one_cpu), 3)
    assert cluster.on("web")["n3"] == 2


def test_preferred_anti_affinity_avoids_and_gives_way() -> None:
    for topology in ("", f"@{ZONE}"):
        cluster = Cluster(nodes("a", "b"))
        cluster.place(cluster.service("db", constraints=("node.id == n1",)), 1)
        web = cluster.service("web", {ANTI_AFFINITY_PREFERRED: f"db{topology}"}, max_replicas=2)
        cluster.place(web, 3)
        assert cluster.on("web") == {"n1": 1, "n2": 2}


def test_zones_differ_by_the_largest_skew_at_most() -> None:
    cluster = Cluster(nodes("a", "a", "b", ""))
    web = cluster.service("web", {MAX_SKEW: f"2@{ZONE}"}, max_replicas=1)
    result = cluster.place(web, 4)
    assert cluster.on("web") == {"n1": 1, "n2": 1, "n3": 1}
    assert len(result.refusals) == 1
    web = cluster.service("api", {MAX_SKEW: f"1@{ZONE}"}, reserve=Resources(nano_cpus=10**9))
    full = replace(
        nodes("", "", "b")[2], description=replace(a_node("n3").description, resources=Resources())
    )
    cluster.accounting.set_node(full)
    result = cluster.place(web, 3)
    assert sum(cluster.on("api").values()) == 1
    assert "max skew exceeded on 3 nodes" in result.refusals[0].reason
    assert cluster.reasons(web)["n4"] == (f"max skew: the node has no {ZONE}",)
    (text,) = cluster.reasons(web)["n2"]
    assert text == f"max skew: {ZONE} a has 1 task and b has 0, the largest difference is 1"


def test_a_zone_without_an_open_node_does_not_count_for_the_skew() -> None:
    cluster = Cluster(nodes("a", "a"))
    cluster.accounting.set_node(replace(nodes("b")[0], id=NodeId("n9")))
    web = cluster.service("web", {MAX_SKEW: f"1@{ZONE}"}, constraints=("node.id != n9",))
    assert not cluster.place(web, 4).refusals


def test_a_task_apart_from_its_own_service_takes_no_place_of_another_slot_that_still_runs() -> None:
    """Slot 1 cannot leave its node, because the other one is closed to its successor.  Slot 2 must not join it."""
    cluster = Cluster(nodes("a"))
    web = cluster.service("web", {ANTI_AFFINITY: "web"})
    (running,) = cluster.place(web, 1).assignments
    old = a_task("old", slot=1, service=web, node="n1", state=TaskState.RUNNING)
    successor = a_task("new1", slot=1, service=web, state=TaskState.PENDING)
    other = a_task("new2", slot=2, service=web, state=TaskState.PENDING)
    view = State()
    for task in (old, successor, other):
        view.table_by_type[Task].store(task.id, None, task, moves=True)
    work = placing_slots(
        [other, successor], cluster.requirements(web), cluster.choices, view, now=0.0, limit=2, is_last=True
    )
    placed = run_at_once(work)
    assert running.node_id == "n1"
    assert [one.task.id for one in placed.assignments] == ["new1"]
    assert [one.task.id for one in placed.refusals] == ["new2"]


def test_a_slot_that_is_reassigned_counts_once() -> None:
    cluster = Cluster(nodes("a", "b"))
    web = cluster.service("web", {ANTI_AFFINITY: f"web@{ZONE}", MAX_SKEW: f"1@{ZONE}"})
    cluster.place(web, 2)
    assert not cluster.place(web, 1, leaving={NodeId("n1"): 1}).refusals
    assert cluster.on("web") == {"n1": 2, "n2": 1}


def broken(cluster: Cluster, services: Sequence[Service]) -> Iterator[str]:
    """The hard rules that the tasks placed so far break, by comparing all of them with each other."""
    where = {id: account.node.spec.labels for id, account in cluster.accounting.accounts.items()}

    def domain(node: str, topology: str) -> str:
        return where[NodeId(node)].get(topology.removeprefix("node.labels."), "") if topology else node

    for service in services:
        own, declared = cluster.placed.get(service.spec.name, {}), parsed_affinities(service.spec.labels)
        for term in (*declared.near, *declared.apart):
            others = {domain(node, term.topology) for node in cluster.placed.get(term.service, {})} - {""}
            for node, number in own.items():
                here = domain(node, term.topology)
                if term in declared.near and here not in others:
                    yield f"{service.spec.name} on {node} is not near {term.text}"
                if term in declared.apart and term.service != service.spec.name and here in others:
                    yield f"{service.spec.name} on {node} is not apart from {term.text}"
                if term in declared.apart and term.service == service.spec.name and here:
                    number = sum(
                        count for other, count in own.items() if domain(other, term.topology) == here
                    )
                    if number > 1:
                        yield f"{number} tasks of {service.spec.name} are in {here}"
        for skew in declared.skews:
            zones = {domain(node, skew.topology) for node in where} - {""}
            counts = Counter(dict.fromkeys(zones, 0))
            for node, number in own.items():
                counts[domain(node, skew.topology)] += number
            if counts and max(counts.values()) - min(counts.values()) > skew.limit:
                yield f"{service.spec.name}: {counts}"


LABELS = st.dictionaries(
    st.sampled_from((AFFINITY, ANTI_AFFINITY, AFFINITY_PREFERRED, ANTI_AFFINITY_PREFERRED)),
    st.builds(
        lambda name, topology: f"{name}{topology}",
        st.sampled_from(("a", "b", "c")),
        st.sampled_from(("", f"@{ZONE}", "@node.labels.rack")),
    ),
    max_size=2,
)
SKEWS = st.sampled_from(({}, {}, {MAX_SKEW: f"1@{ZONE}"}, {MAX_SKEW: "2@node.labels.rack"}))


@settings(max_examples=300)
@given(
    where=st.lists(
        st.tuples(st.sampled_from(("x", "y", "")), st.sampled_from(("r", "s", ""))), min_size=1, max_size=6
    ),
    labels=st.tuples(LABELS, LABELS, LABELS),
    skews=st.tuples(SKEWS, SKEWS, SKEWS),
    limits=st.tuples(*[st.integers(0, 2)] * 3),
    steps=st.lists(st.tuples(st.sampled_from((0, 1, 2)), st.integers(1, 4)), max_size=6),
    spread=st.booleans(),
)
def test_hard_rules_hold_and_a_task_is_refused_only_if_every_node_refuses_it(
    where: list[tuple[str, str]],
    labels: tuple[dict[str, str], ...],
    skews: tuple[dict[str, str], ...],
    limits: tuple[int, ...],
    steps: list[tuple[int, int]],
    spread: bool,
) -> None:
    """Compares the choices, which look at domains, with the filters, which look at one node at a time."""
    cluster = Cluster(
        [
            a_node(
                f"n{number}", labels={key: value for key, value in (("zone", zone), ("rack", rack)) if value}
            )
            for number, (zone, rack) in enumerate(where)
        ]
    )
    services = []
    for name, own, skew, limit in zip("abc", labels, skews, limits, strict=True):
        try:
            parsed_affinities({**own, **skew})
        except InvalidArgument:
            own = {}
        requested: dict[str, object] = {"max_replicas": limit, "spread": (ZONE,) if spread else ()}
        services.append(cluster.service(name, {**own, **skew}, **requested))
    for index, count in steps:
        service = services[index]
        for _ in range(count):
            wanted = cluster.requirements(service)
            copies = cluster.accounting.copies(service.id)
            fitting = {
                id
                for id, account in cluster.accounting.accounts.items()
                if first_refusing(wanted, account, copies[id]) is None
            }
            result = cluster.place(service, 1)
            assert {one.node_id for one in result.assignments} <= fitting
            assert bool(result.assignments) == bool(fitting)
    for index, count in steps:  # in one batch, as many as one by one
        service = services[index]
        placed = len(cluster.place(service, count).assignments)
        assert not list(broken(cluster, services))
        if placed < count:
            wanted, copies = cluster.requirements(service), cluster.accounting.copies(service.id)
            for id, account in cluster.accounting.accounts.items():
                assert first_refusing(wanted, account, copies[id]) is not None


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({AFFINITY: "web", ANTI_AFFINITY: "WEB"}, "contradict each other"),
        ({AFFINITY: "web", ANTI_AFFINITY: f"web@{ZONE}"}, "contradict each other"),
        ({AFFINITY: "web@node", ANTI_AFFINITY: "web"}, "contradict each other"),
        ({AFFINITY: "web@zone"}, r"expected SERVICE\[@TOPOLOGY\]"),
        ({AFFINITY: ""}, r"expected SERVICE\[@TOPOLOGY\]"),
        ({ANTI_AFFINITY: "a,,b"}, r"expected SERVICE\[@TOPOLOGY\]"),
        ({ANTI_AFFINITY: "a,A"}, "each once per topology"),
        ({ANTI_AFFINITY: ",".join(f"s{number}" for number in range(21))}, "at most 20 services"),
        ({MAX_SKEW: "1"}, "expected NUMBER@TOPOLOGY"),
        ({MAX_SKEW: f"0@{ZONE}"}, "expected NUMBER@TOPOLOGY"),
        ({MAX_SKEW: "1@node"}, "expected NUMBER@TOPOLOGY"),
        ({MAX_SKEW: f"1@{ZONE},2@{ZONE}"}, "names a topology twice"),
    ],
)
def test_labels_that_cannot_work_are_refused_by_name(labels: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parsed_affinities(labels)


def test_near_by_zone_and_apart_by_node_is_no_contradiction() -> None:
    parsed_affinities({AFFINITY: f"web@{ZONE}", ANTI_AFFINITY: "web"})
