"""The moves of ``skep rebalance``: what they improve, what they never touch, and that a plan ends."""

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.time_slices import run_at_once
from skep.manager.rebalance import plan as rebalance_plan
from skep.manager.rebalance.plan import LASTING_S, Balance, PlannedMove
from skep.manager.scheduler.nodes.filters import first_refusing
from skep.model.container import ContainerSpec, Mount
from skep.model.node import Availability, Node, NodeState
from skep.model.options.affinity import AFFINITY, AFFINITY_PREFERRED, ANTI_AFFINITY, MAX_SKEW
from skep.model.options.constraints import is_satisfied
from skep.model.options.freezes import ChangeFreeze
from skep.model.options.labels import MAINTENANCE
from skep.model.service import (
    PortConfig,
    PublishMode,
    Resources,
    RestartCondition,
    RestartPolicy,
    Service,
    UpdateState,
)
from skep.model.swarm import Swarm, SwarmSpec
from skep.model.task import Relocation, Restart, Task, TaskState, TaskStatus
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.meta import Version
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.store.interface import Object
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_node, a_service, a_task

ObjectKind = TypeVar("ObjectKind", bound=Object)

SEEDS = 80
GIB = 1 << 30
MEMORY = 8 * GIB


def put(state: State, *objects: Object) -> None:
    for object in objects:
        tx = LocalTransaction(state, 0)
        tx.put(object)
        tx.adopt_into(state)


def a_state(*objects: Object) -> State:
    put(state := State(), *objects)
    return state


def add(state: State, service: Service, *nodes: str, **fields: object) -> None:
    """Add a service and its running tasks, one on each of ``nodes``."""
    put(state, service)
    version = state.get(Service, service.id).spec_version
    for slot, id in enumerate(nodes, 1):
        task = a_task(f"{service.id}-{slot}", slot=slot, node=id, service=service)
        put(state, replace(task, spec_version=version, **fields))


def plan(state: State, loads: Mapping[str, float] | None = None, now_ns: int = 0) -> list[PlannedMove]:
    given_loads = {NodeId(id): load for id, load in (loads or {}).items()}
    return run_at_once(Balance(state, given_loads, now_ns).planning())


def words(moves: list[PlannedMove]) -> list[str]:
    return [f"{one.service}.{one.slot} {one.source_name} {one.target_name}" for one in moves]


def web(*nodes: str, **spec: object) -> Service:
    labels = spec.pop("labels", {})
    service = a_service("web", replicas=len(nodes), **spec)
    return replace(service, spec=replace(service.spec, labels=labels))


CROWDED = ("n1", "n1", "n1", "n2")


def crowded(**spec: object) -> State:
    """Return two nodes, of which n1 has three of the four tasks of web, and n3 that has returned."""
    state = a_state(a_node("n1"), a_node("n2"), a_node("n3"))
    add(state, web(*CROWDED, **spec), *CROWDED)
    return state


def test_tasks_move_to_a_node_that_returned_and_each_move_says_its_gain() -> None:
    moves = plan(crowded())
    assert words(moves) == ["web.3 n1 n3"]
    (own,) = [one.own for one in moves]
    assert (own.source_before, own.source_after, own.target_before, own.target_after) == (3, 2, 0, 1)


def test_an_even_cluster_has_no_moves() -> None:
    state = a_state(a_node("n1"), a_node("n2"))
    add(state, web("n1", "n2"), "n1", "n2")
    assert plan(state) == []


def test_a_task_alone_on_a_full_node_moves_for_the_number_of_all_tasks() -> None:
    state = a_state(a_node("n1"), a_node("n2"), a_node("n3"))
    for name in ("a", "b", "c"):
        add(state, a_service(name, replicas=2), "n1", "n2")
    assert words(plan(state)) == ["a.2 n2 n3", "b.1 n1 n3"]


def test_tasks_that_come_and_go_move_no_others() -> None:
    """Their nodes change at each restart, and tasks of healthy services would follow them for ever."""
    state = a_state(a_node("n1"), a_node("n2"))
    add(state, web("n1", "n2"), "n1", "n2")
    add(state, a_service("job", replicas=3), "n1", "n1", "n1", job_iteration=Version(index=1))
    failed = TaskStatus(state=TaskState.RUNNING, timestamp=timestamp(0))
    add(state, a_service("loop", replicas=3), "n1", "n1", "n1", restart=Restart(failures=2), status=failed)
    assert plan(state, now_ns=(LASTING_S - 1) * SECOND_NS) == []
    assert words(plan(state, now_ns=LASTING_S * SECOND_NS)) == ["loop.3 n1 n2"]


VOLUME = ContainerSpec(mounts=(Mount(type="volume", source="data", target="/data"),))
BOUND = ContainerSpec(mounts=(Mount(type="bind", source="/srv", target="/data"),))
SHARED = ContainerSpec(mounts=(Mount(type="cluster", source="disk", target="/data"),))
HOST_PORT = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)


def with_container(state: State, container: ContainerSpec) -> State:
    service = state.get(Service, "web")
    template = replace(service.spec.task_template, container_spec=container)
    put(state, changed := replace(service, spec=replace(service.spec, task_template=template)))
    version = state.get(Service, changed.id).spec_version
    for task in state.find(Task):
        put(state, replace(task, spec=template, spec_version=version))
    return state


@pytest.mark.parametrize("container", [VOLUME, BOUND, SHARED])
def test_tasks_with_data_or_a_cluster_volume_stay(container: ContainerSpec) -> None:
    assert plan(with_container(crowded(), container)) == []


@pytest.mark.parametrize(
    "spec",
    [
        {"ports": (HOST_PORT,)},
        {"restart": RestartPolicy(condition=RestartCondition.NONE)},
        {"state": UpdateState.PAUSED},
        {"state": UpdateState.UPDATING},
        {"labels": {AFFINITY_PREFERRED: "db"}},
    ],
)
def test_tasks_that_depend_on_their_node_or_are_being_changed_stay(spec: dict[str, object]) -> None:
    assert plan(crowded(**spec)) == []


def test_tasks_near_which_others_must_run_stay() -> None:
    state = crowded()
    follower = a_service("cache")
    follower = replace(follower, spec=replace(follower.spec, labels={AFFINITY: "web"}))
    add(state, follower, "n1")
    assert "web" not in {one.service for one in plan(state)}


def test_a_service_that_starts_stops_or_moves_a_task_waits() -> None:
    for changes in (
        {"status": replace(a_task().status, state=TaskState.STARTING)},
        {"desired_state": TaskState.SHUTDOWN},
        {"relocation": Relocation(target=NodeId("n3"))},
    ):
        state = crowded()
        put(state, replace(state.get(Task, "web-4"), **changes))
        assert plan(state) == [], changes


def test_freezes_of_the_cluster_and_of_the_stack_hold_back_moves() -> None:
    freeze = ChangeFreeze(until=Timestamp("2027-01-01T00:00:00Z"))
    for scope, count in (("", 0), ("shop", 0), ("blog", 1)):
        state = crowded(labels={STACK_LABEL: "shop"})
        put(state, Swarm(id=ClusterId("c"), change_freezes={scope: freeze}))
        assert len(plan(state)) == count, scope


def test_nodes_that_hold_the_reboot_lock_take_no_part() -> None:
    state = crowded()
    lock = '{"holders":[{"node":"n3","by":"me","until":"2027-01-01T00:00:00Z"}]}'
    put(state, Swarm(id=ClusterId("c"), spec=SwarmSpec(labels={MAINTENANCE: lock})))
    assert words(plan(state)) == ["web.3 n1 n2"]


def test_a_busy_node_gets_no_task_from_a_less_busy_one() -> None:
    assert words(plan(crowded(), {"n1": 0.3, "n2": 0.3, "n3": 0.9})) == []
    assert words(plan(crowded(), {"n1": 0.3, "n3": 0.9})) == [], (
        "n2 may be as busy as the others are on average"
    )
    assert words(plan(crowded(), {"n1": 0.6, "n2": 0.6, "n3": 0.1})) == ["web.3 n1 n3"]


def test_a_paused_or_lost_node_gets_no_task() -> None:
    for node in (
        a_node("n3", availability=Availability.PAUSE),
        a_node("n3", state=NodeState.DOWN),
    ):
        state = crowded()
        put(state, replace(node, version=state.get(Node, "n3").version))
        assert [one.target for one in plan(state) if one.target == "n3"] == []


# -- properties --------------------------------------------------------------------------------------------------------


@st.composite
def states(draw: st.DrawFn) -> tuple[State, dict[str, float]]:
    """Draw nodes in two zones and services whose tasks are anywhere they may be, however unevenly."""
    nodes = [
        a_node(
            f"n{number}",
            labels={"zone": draw(st.sampled_from(["a", "b"])), "disk": draw(st.sampled_from(["ssd", "hdd"]))},
            availability=draw(st.sampled_from([Availability.ACTIVE] * 4 + [Availability.PAUSE])),
        )
        for number in range(draw(st.integers(2, 6)))
    ]
    state = a_state(*nodes)
    used: Counter[str] = Counter()
    for number in range(draw(st.integers(1, 5))):
        name = f"s{number}"
        memory = draw(st.sampled_from([0, 0, GIB, 3 * GIB]))
        limit = draw(st.sampled_from([0, 0, 2]))
        labels = draw(
            st.sampled_from(
                [{}, {}, {MAX_SKEW: "1@node.labels.zone"}, {ANTI_AFFINITY: "s0"}, {AFFINITY: "s1"}]
            )
        )
        constraints = draw(st.sampled_from([(), (), ("node.labels.disk==ssd",)]))
        places: list[str] = []
        for _ in range(draw(st.integers(1, 7))):
            fitting = [
                one.id
                for one in nodes
                if used[one.id] + memory <= MEMORY
                and (not limit or places.count(one.id) < limit)
                and is_satisfied(constraints, one)
            ]
            if fitting:
                places.append(draw(st.sampled_from(fitting)))
                used[places[-1]] += memory
        if not places:
            continue
        service = a_service(
            name,
            replicas=len(places),
            max_replicas=limit,
            constraints=constraints,
            reserve=Resources(memory_bytes=memory) if memory else None,
            spread=draw(st.sampled_from([(), ("node.labels.zone",)])),
        )
        add(state, replace(service, spec=replace(service.spec, labels=labels)), *places)
    loads = {one.id: draw(st.sampled_from([0.1, 0.5, 0.9])) for one in nodes if draw(st.booleans())}
    return state, loads


def squares(counts: Counter[str]) -> int:
    return sum(count * count for count in counts.values())


def measures(state: State) -> dict[str, int]:
    """Return how uneven the state is, by measure.  No move may raise one of them."""
    found: dict[str, int] = {"all": squares(Counter(task.node_id for task in state.find(Task)))}
    for service in state.find(Service):
        tasks = state.find(Task, service_id=service.id)
        found[service.id] = squares(Counter(task.node_id for task in tasks))
        zones = Counter(state.get(Node, task.node_id).spec.labels["zone"] for task in tasks)
        placement = service.spec.task_template.placement
        if MAX_SKEW in service.spec.labels or (placement is not None and placement.preferences):
            found[f"zones of {service.id}"] = squares(zones)
            found[f"skew of {service.id}"] = max(zones.values()) - min(zones[one] for one in ("a", "b"))
    return found


def broken_rules(state: State) -> set[str]:
    """Return the rules that the state breaks."""
    broken: set[str] = set()
    names = {one.spec.name: one.id for one in state.find(Service)}
    for node in state.find(Node):
        here = state.find(Task, node_id=node.id)
        if sum(_memory(task) for task in here) > MEMORY:
            broken.add(f"memory of {node.id}")
        for service_id, count in Counter(task.service_id for task in here).items():
            spec = state.get(Service, service_id).spec
            placement = spec.task_template.placement
            limit = placement.max_replicas if placement is not None else 0
            if limit and count > limit:
                broken.add(f"copies of {service_id} on {node.id}")
            if placement is not None and not is_satisfied(placement.constraints, node):
                broken.add(f"constraints of {service_id} on {node.id}")
            others = {task.service_id for task in here if task.service_id != service_id}
            if names.get(spec.labels.get(ANTI_AFFINITY, "")) in others:
                broken.add(f"{service_id} beside s0 on {node.id}")
            near = spec.labels.get(AFFINITY)
            if near and names.get(near) not in {task.service_id for task in here}:
                broken.add(f"{service_id} away from {near} on {node.id}")
    return broken


def _memory(task: Task) -> int:
    resources = task.spec.resources
    return resources.reservations.memory_bytes if resources and resources.reservations else 0


def apply(state: State, move: PlannedMove) -> None:
    """Carry out a move as the orchestrator does: the successor runs first, so both need space for a while."""
    task = state.get(Task, move.task_id)
    tx = LocalTransaction(state, 0)
    tx.delete(Task, task.id)
    tx.adopt_into(state)
    put(state, replace(task, node_id=move.target, version=replace(task.version, index=0)))


@settings(max_examples=150, deadline=None)
@given(states())
def test_no_move_makes_anything_worse_and_afterwards_none_is_left(
    drawn: tuple[State, dict[str, float]],
) -> None:
    state, loads = drawn
    moves = plan(state, loads)
    assert moves == plan(state, loads), "the plan follows from state and loads alone"
    for move in moves:
        before, broken = measures(state), broken_rules(state)
        assert state.get(Node, move.target).spec.availability is Availability.ACTIVE
        apply(state, move)
        after = measures(state)
        assert all(after[key] <= value for key, value in before.items()), (move, before, after)
        assert sum(after.values()) < sum(before.values())
        assert broken_rules(state) <= broken, move
    if not loads:
        assert plan(state) == [], "nothing is left to move"


class Counting(Balance):
    """Counts the pairs of nodes that are compared."""

    tried = 0

    def _may_move(self, *pair):
        self.tried += 1
        return super()._may_move(*pair)


class Exhaustive(Counting):
    """Tries all nodes with all targets again for each move."""

    def _next(self):
        accounts = [one for one in self._accounting.accounts.values() if self._takes_part(one)]
        ranked = sorted(
            accounts, key=lambda one: (self._lasting[one.node.id], self._loads[one.node.id], one.node.id)
        )
        for source in reversed(ranked):
            if self._lasting[source.node.id] <= self._lasting[ranked[0].node.id]:
                return None
            for id, group in self._by_copies(source):
                for target in ranked[: rebalance_plan.TRIES_MAX]:
                    yield
                    if self._lasting[target.node.id] >= self._lasting[source.node.id]:
                        break
                    copies = self._accounting.copies(id)
                    if first_refusing(group.requirements, target, copies[target.node.id]) is not None:
                        continue
                    if self._may_move(source, target, group, copies):
                        return source, target, group
        return None


@settings(max_examples=300, deadline=None)
@given(states(), st.integers(1, 4))
def test_a_plan_is_the_one_that_tries_all_pairs_again_for_each_move(
    drawn: tuple[State, dict[str, float]], tries: int
) -> None:
    state, loads = drawn
    given_loads = {NodeId(id): load for id, load in loads.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebalance_plan, "TRIES_MAX", tries)
        assert plan(state, loads) == run_at_once(Exhaustive(state, given_loads, 0).planning())


def crowd(random: Random) -> State:
    """Return more nodes than are tried as targets, and services that depend on zones and on each other."""
    nodes = [f"n{number:02}" for number in range(random.randint(6, 14))]
    state = a_state(*(a_node(id, labels={"zone": random.choice("abc")}) for id in nodes))
    for number in range(random.randint(2, 6)):
        crowded = random.sample(nodes, random.randint(1, len(nodes) // 2))
        places = [random.choice(crowded) for _ in range(random.randint(2, 14))]
        other = f"s{random.randint(0, 5)}"
        labels = random.choice(
            (
                {},
                {},
                {MAX_SKEW: "1@node.labels.zone"},
                {ANTI_AFFINITY: f"{other}@node.labels.zone"},
                {ANTI_AFFINITY: other},
            )
        )
        spread = random.choice(((), (), ("node.labels.zone",)))
        service = a_service(f"s{number}", replicas=len(places), spread=spread)
        add(state, replace(service, spec=replace(service.spec, labels=labels)), *places)
    return state


@pytest.mark.parametrize("tries", [1, 2, 4])
def test_a_plan_for_a_crowd_is_the_one_that_tries_all_pairs_again_for_each_move(
    monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    monkeypatch.setattr(rebalance_plan, "TRIES_MAX", tries)
    moves = 0
    for seed in range(SEEDS):
        state = crowd(Random(seed))
        found = plan(state)
        assert found == run_at_once(Exhaustive(state, {}, 0).planning()), seed
        moves += len(found)
    assert moves > SEEDS


def test_a_task_may_move_as_soon_as_another_service_has_left_the_zone() -> None:
    """Its node and its target are as before, when it could not move."""
    zones = {"b1": "b", "c1": "c", "c2": "c", "a1": "d"}
    state = a_state(*(a_node(id, labels={"zone": zone}) for id, zone in zones.items()))
    apart = a_service("apart", replicas=4, constraints=("node.labels.zone != d",))
    labels = {ANTI_AFFINITY: "other@node.labels.zone"}
    add(state, replace(apart, spec=replace(apart.spec, labels=labels)), *["b1"] * 4)
    add(state, a_service("other", replicas=1), "c1")
    add(state, a_service("incomplete", replicas=9), "c1", "c1")
    assert words(plan(state))[:2] == ["other.1 c1 a1", "apart.4 b1 c2"]


def test_nodes_whose_tasks_fit_nowhere_are_not_tried_again_for_each_move() -> None:
    """Thirty nodes have tasks of services that the other nodes refuse, or have already."""
    crowd, empty = [f"c{number:02}" for number in range(30)], [f"e{number}" for number in range(5)]
    state = a_state(
        *(a_node(id, labels={"disk": "ssd"}) for id in crowd), *(a_node(id) for id in (*empty, "source"))
    )
    for number in range(5):
        everywhere = [*crowd, *empty]
        add(state, a_service(f"all{number}", replicas=len(everywhere)), *everywhere)
    for number in range(10):
        add(state, a_service(f"crowd{number}", replicas=30, constraints=("node.labels.disk==ssd",)), *crowd)
    add(state, a_service("web", replicas=18), *["source"] * 18)
    counting, exhaustive = Counting(state, {}, 0), Exhaustive(state, {}, 0)
    moves = run_at_once(counting.planning())
    assert moves == run_at_once(exhaustive.planning())
    assert len(moves) > 10
    assert counting.tried < exhaustive.tried / 3


class UnreadableTasks(State):
    """A state in which the tasks of one service cannot be read."""

    def find(self, kind: type[ObjectKind], **by: str) -> Sequence[ObjectKind]:
        if by.get("service_id") == "bad":
            raise RuntimeError("not readable")
        return super().find(kind, **by)


def test_a_service_whose_tasks_cannot_be_read_stays_and_the_others_move() -> None:
    put(state := UnreadableTasks(), a_node("n1"), a_node("n2"), a_node("n3"))
    add(state, web(*CROWDED), *CROWDED)
    add(state, a_service("bad", replicas=4), *CROWDED)
    assert {one.service for one in plan(state)} == {"web"}
