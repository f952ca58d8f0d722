"""What would follow from a change: tasks that move, wait or are lost, minimums, freezes and quorums."""

from collections.abc import Callable, Iterable

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument, NotFound
from skep.manager.diagnosis.reasons import LOOP_FROM
from skep.manager.scheduler.dependencies import RETURNED_S
from skep.manager.what_if.answer import Question, SupposedOutcome
from skep.manager.what_if.rehearsal import Rehearsal
from skep.manager.what_if.suppositions import deploy, drain, lose, nodes_named, quorum_after
from skep.model.container import ConfigReference, ContainerSpec, FileTarget, Mount
from skep.model.node import (
    Availability,
    EngineDescription,
    EnginePlugin,
    ManagerStatus,
    Node,
    NodeRole,
    Reachability,
    SessionOwner,
)
from skep.model.options.autoscaling import with_replicas
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.labels import MIN_AVAILABLE, ON_DISCONNECT
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.service import (
    GlobalJob,
    JobStatus,
    NetworkAttachmentConfig,
    Resources,
    Service,
    ServiceMode,
)
from skep.model.swarm import Swarm
from skep.model.task import Restart, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, SessionId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp
from skep.store.interface import Object
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_node, a_service, a_service_spec, a_task

GIB = 1 << 30


def a_state(*objects: Object) -> State:
    state = State()
    for object in objects:
        tx = LocalTransaction(state, 0)
        tx.put(object)
        tx.adopt_into(state)
    return state


def node(id: str, **fields: object) -> Node:
    """Return a node with a session."""
    return replace(a_node(id, **fields), session=SessionOwner(session_id=SessionId(f"of-{id}")))  # type: ignore[arg-type]


def with_tasks(service: Service, *nodes: str) -> Iterable[Object]:
    """Yield a service and its running tasks, one on each of ``nodes``."""
    yield service
    for slot, id in enumerate(nodes, 1):
        task = a_task(f"{service.id}-{slot}", slot=slot, node=id, service=service)
        yield replace(task, spec_version=replace(service.version, index=1))


def ask(
    state: State, suppose: Callable[[Rehearsal], None], is_visible: Callable[[Service], bool] = lambda _: True
) -> SupposedOutcome:
    question = Question(Rehearsal(state, 0), is_visible)
    for _ in question.begin():
        pass
    suppose(question.rehearsal)
    for _ in question.settle():
        pass
    return question.answer


def losing(*ids: str) -> Callable[[Rehearsal], None]:
    return lambda rehearsal: lose(rehearsal, [NodeId(id) for id in ids])


def draining(*ids: str) -> Callable[[Rehearsal], None]:
    return lambda rehearsal: drain(rehearsal, [NodeId(id) for id in ids])


def test_tasks_of_a_lost_node_run_elsewhere_after_the_grace_period_and_their_start() -> None:
    state = a_state(node("w1"), node("w2"), *with_tasks(a_service("web", replicas=2), "w1", "w2"))
    before = [task.id for task in state.find(Task)]
    answer = ask(state, losing("w1"))
    (web,) = answer.services
    assert (web.before, web.lowest, web.after, web.desired) == (2, 1, 2, 2)
    assert [(one.tasks, one.source, one.target) for one in web.moves] == [(1, "w1", "w2")]
    assert web.missing == ()
    assert answer.seconds > 15, "three heartbeats are missed first"
    assert [(one.hostname, one.before, one.after) for one in answer.nodes] == [("w1", 1, 0), ("w2", 1, 2)]
    assert [task.id for task in state.find(Task)] == before, "nothing was written"


def test_a_task_that_fits_no_other_node_waits_with_its_reason() -> None:
    db = a_service("db", replicas=1, constraints=("node.hostname==w1",))
    answer = ask(a_state(node("w1"), node("w2"), *with_tasks(db, "w1")), losing("w1"))
    (found,) = answer.services
    assert (found.after, [(one.tasks, one.kind) for one in found.missing]) == (0, [(1, "no-node")])
    assert "needs node.hostname==w1" in found.missing[0].reason


def test_what_is_left_for_reservations_is_counted_before_and_afterwards() -> None:
    size = Resources(nano_cpus=4_000_000_000, memory_bytes=8 * GIB)
    web = a_service("web", replicas=2, reserve=Resources(nano_cpus=1_000_000_000, memory_bytes=2 * GIB))
    nodes = [node(id, has=size) for id in ("w1", "w2")]
    paused = node("w3", has=size, availability=Availability.PAUSE)
    answer = ask(a_state(*nodes, paused, *with_tasks(web, "w1", "w2")), losing("w1"))
    before, after = answer.capacity_before, answer.capacity_after
    assert (before.nodes, before.free_nano_cpus, before.free_memory_bytes) == (2, 6_000_000_000, 12 * GIB)
    assert (after.nodes, after.free_nano_cpus, after.free_memory_bytes) == (1, 2_000_000_000, 4 * GIB)
    w1, w2 = answer.nodes
    assert (w1.takes_tasks, w2.takes_tasks) == (False, True)
    assert (w2.free_nano_cpus, w2.free_memory_bytes) == (2_000_000_000, 4 * GIB)


def test_data_that_a_moved_task_leaves_behind_is_named() -> None:
    mounts = (
        Mount(type="volume", source="data", target="/data"),
        Mount(source="/srv", target="/srv", type="bind"),
    )
    spec = a_service_spec("db")
    template = replace(spec.task_template, container_spec=ContainerSpec(image="db:1", mounts=mounts))
    db = a_service("db", spec=replace(spec, task_template=template))
    state = a_state(node("w1"), node("w2"), *with_tasks(db, "w1"))
    assert ask(state, draining("w1")).services[0].left_behind == ("data",)
    grown = ask(state, lambda rehearsal: deploy(rehearsal, with_replicas(db.spec, 2))).services[0]
    assert grown.left_behind == (), "a new task leaves nothing behind"


def test_only_those_tasks_of_a_job_move_whose_node_is_drained() -> None:
    spec = replace(a_service_spec("job"), mode=ServiceMode(global_job=GlobalJob()))
    job = replace(a_service("job", spec=spec), job_status=JobStatus())
    service, *tasks = with_tasks(job, "w1", "w2")
    running = [
        replace(one, slot=0, desired_state=TaskState.COMPLETE, job_iteration=Version())
        for one in tasks
        if isinstance(one, Task)
    ]
    answer = ask(a_state(node("w1"), node("w2"), service, *running), draining("w1"))
    (effect,) = answer.services
    assert [(one.tasks, one.source, one.target) for one in effect.moves] == [(1, "w1", "")]
    assert (effect.before, effect.lowest, effect.after) == (2, 1, 1)


def test_data_that_is_left_behind_has_the_name_that_its_node_gave_it() -> None:
    spec = a_service_spec("db")
    mount = Mount(type="volume", source="data-{{.Task.Slot}}", target="/data")
    template = replace(spec.task_template, container_spec=ContainerSpec(image="db:1", mounts=(mount,)))
    db = a_service("db", spec=replace(spec, task_template=template))
    w1 = node("w1")
    engine = EngineDescription(labels={SLOT_VOLUMES_LABEL: f"data-1={spec.name}.1@5 data-2={spec.name}.2@5"})
    w1 = replace(w1, description=replace(w1.description, engine=engine))
    state = a_state(w1, node("w2"), *with_tasks(db, "w1"))
    assert ask(state, draining("w1")).services[0].left_behind == ("data-1",)


def test_a_drain_starts_replacements_first_and_a_task_without_room_stays() -> None:
    need = Resources(memory_bytes=2 * GIB)
    size = Resources(nano_cpus=4_000_000_000, memory_bytes=3 * GIB)
    web = a_service("web", replicas=3, reserve=need)
    state = a_state(
        *(node(id, has=size) for id in ("w1", "w2", "w3", "w4")), *with_tasks(web, "w1", "w2", "w3")
    )
    moved = ask(state, draining("w1")).services[0]
    assert (moved.lowest, moved.after, moved.moves[0].target) == (3, 3, "w4")
    blocked = ask(state, draining("w1", "w2")).services[0]
    assert (blocked.lowest, blocked.after, blocked.missing) == (3, 3, ()), "the old task keeps running"
    assert blocked.staying == 1
    assert blocked.why_staying.startswith("web.2: it stays on w2, which is drained")


def test_a_task_in_a_crash_loop_does_not_run_afterwards_and_is_no_effect_of_the_change() -> None:
    service, failed = with_tasks(a_service("web", replicas=1), "w1")
    assert isinstance(service, Service)
    assert isinstance(failed, Task)
    failed = replace(failed, desired_state=TaskState.SHUTDOWN, status=TaskStatus(state=TaskState.FAILED))
    again = replace(
        failed,
        id=TaskId("again"),
        created_at=Timestamp("2026-01-02T03:04:06Z"),
        desired_state=TaskState.RUNNING,
        status=TaskStatus(state=TaskState.READY),
        restart=Restart(failures=LOOP_FROM),
    )
    state = a_state(node("w1"), node("w2"), service, failed, again)
    assert ask(state, losing("w2")).services == ()
    (web,) = ask(state, losing("w1")).services
    assert (web.before, web.after, sum(one.tasks for one in web.missing)) == (0, 0, 1)
    assert [(one.source, one.target) for one in web.moves] == [("w1", "w2")]
    held = replace(again, desired_state=TaskState.READY)
    state = a_state(node("w1"), node("w2"), service, failed, held)
    assert ask(state, losing("w2")).services == (), "its next attempt begins meanwhile, and fails as well"
    container = replace(service.spec.task_template.container_spec, image="web:2")
    mended = replace(
        service.spec, task_template=replace(service.spec.task_template, container_spec=container)
    )
    (web,) = ask(state, lambda rehearsal: deploy(rehearsal, mended)).services
    assert (web.before, web.after, web.missing) == (0, 1, ()), "its tasks before were of another spec"


def test_a_service_with_a_dependency_does_not_wait_as_under_a_new_leader() -> None:
    """A new leader waits until the nodes confirm that the database runs.  The present one knows it already."""
    db, labels = a_service("db", replicas=1), {DEPENDS_ON: "db=service_healthy"}
    state = a_state(node("w1"), node("w2"), *with_tasks(db, "w1"))
    web = replace(a_service_spec("web", replicas=1), labels=labels)
    answer = ask(state, lambda rehearsal: deploy(rehearsal, web))
    assert [(one.name, one.after) for one in answer.services] == [("web", 1)]
    assert answer.seconds < RETURNED_S


def test_a_minimum_that_is_not_met_is_named() -> None:
    spec = replace(a_service_spec("web", replicas=2), labels={MIN_AVAILABLE: "2"})
    state = a_state(node("w1"), node("w2"), *with_tasks(a_service("web", spec=spec), "w1", "w2"))
    (web,) = ask(state, losing("w1")).services
    assert (web.minimum, web.lowest, web.is_below_minimum) == (2, 1, True)
    (web,) = ask(state, draining("w1")).services
    assert not web.is_below_minimum


def test_the_loss_of_most_nodes_freezes_replacement_for_ten_minutes() -> None:
    ids = ("w1", "w2", "w3", "w4")
    state = a_state(Swarm(id="s"), *(node(id) for id in ids), *with_tasks(a_service("web", replicas=4), *ids))
    answer = ask(state, losing("w1", "w2", "w3"))
    assert "frozen" in answer.notes[0]
    assert answer.seconds > 600
    assert answer.services[0].after == 4


def test_a_task_that_waits_for_its_node_is_lost_with_it() -> None:
    spec = replace(a_service_spec("web", replicas=1), labels={ON_DISCONNECT: "keep"})
    state = a_state(node("w1"), node("w2"), *with_tasks(a_service("web", spec=spec), "w1"))
    (web,) = ask(state, losing("w1")).services
    assert (web.after, [one.kind for one in web.missing]) == (0, ["node-lost"])


def test_services_of_other_stacks_are_counted_and_not_named() -> None:
    state = a_state(
        node("w1"), *with_tasks(a_service("web", replicas=1), "w1"), *with_tasks(a_service("db"), "w1")
    )
    answer = ask(state, losing("w1"), lambda service: service.spec.name == "web")
    assert [one.name for one in answer.services] == ["web"]
    assert (answer.other_services, answer.other_missing) == (1, 1)


def test_more_tasks_than_fit_wait() -> None:
    web = a_service("web", replicas=1, reserve=Resources(memory_bytes=3 * GIB))
    state = a_state(node("w1"), node("w2"), *with_tasks(web, "w1"))
    spec = replace(state.get(Service, "web").spec, mode=a_service_spec(replicas=5).mode)
    (found,) = ask(state, lambda rehearsal: deploy(rehearsal, spec)).services
    assert (found.before, found.after, found.desired) == (1, 4, 5)
    assert [(one.tasks, one.kind) for one in found.missing] == [(1, "no-node")]


def a_blue_green(memory_bytes: int) -> tuple[Service, Callable[[Rehearsal], None]]:
    """Return a service, and its blue-green update to another image, which waits for a user."""
    labels = {"skep.update": "blue-green", "skep.update.promote": "manual"}
    web = a_service("web", replicas=2, reserve=Resources(memory_bytes=memory_bytes))
    web = replace(web, spec=replace(web.spec, labels=labels))
    container = replace(web.spec.task_template.container_spec, image="web:2")
    wanted = replace(web.spec, task_template=replace(web.spec.task_template, container_spec=container))
    return web, lambda rehearsal: deploy(rehearsal, wanted)


def test_a_staged_update_adds_tasks_to_those_that_stay() -> None:
    web, update = a_blue_green(GIB)
    answer = ask(a_state(node("w1"), node("w2"), *with_tasks(web, "w1", "w2")), update)
    (found,) = answer.services
    assert (found.before, found.lowest, found.after) == (2, 2, 4)
    assert {one.source for one in found.moves} == {""}
    assert sum(one.tasks for one in found.moves) == 2
    assert (found.missing, found.failed_update) == ((), "")


def test_a_staged_update_without_room_for_the_new_tasks_fails() -> None:
    web, update = a_blue_green(5 * GIB)
    (found,) = ask(a_state(node("w1"), node("w2"), *with_tasks(web, "w1", "w2")), update).services
    assert (found.before, found.after, found.moves) == (2, 2, ())
    assert found.failed_update.startswith("update rolled back because a new task made no progress")


QUERY = {
    "skep.update.prometheus": "http://prometheus:9090",
    "skep.update.query": "sum(errors)",
    "skep.update.query-max": "1",
}


@pytest.mark.parametrize("labels", [{}, QUERY])
def test_a_canary_passes_all_its_steps_as_if_its_query_held(labels: dict[str, str]) -> None:
    steps = {"skep.update": "canary", "skep.update.steps": "50%", "skep.update.step-time": "30s"}
    web = a_service("web", replicas=2, reserve=Resources(memory_bytes=GIB))
    container = replace(web.spec.task_template.container_spec, image="web:2")
    template = replace(web.spec.task_template, container_spec=container)
    wanted = replace(web.spec, labels={**steps, **labels}, task_template=template)
    state = a_state(node("w1"), node("w2"), *with_tasks(web, "w1", "w2"))
    (found,) = ask(state, lambda rehearsal: deploy(rehearsal, wanted)).services
    assert (found.before, found.after, found.moves, found.failed_update) == (2, 2, (), "")


def test_a_stack_brings_its_own_networks_configs_and_certificates() -> None:
    spec = a_service_spec("web", replicas=2)
    container = replace(
        spec.task_template.container_spec,
        configs=(ConfigReference(file=FileTarget(name="/settings"), config_name="settings"),),
    )
    template = replace(
        spec.task_template,
        container_spec=container,
        networks=(NetworkAttachmentConfig(target="shop_default"),),
    )
    engine = EngineDescription(plugins=(EnginePlugin(type="Network", name="overlay"),))
    w1 = node("w1")
    w1 = replace(w1, description=replace(w1.description, engine=engine))
    state = a_state(Swarm(id="s", default_addr_pool=("10.0.0.0/8",), subnet_size=24), w1)
    labels = {"skep.http": "a.example", "skep.http.tls": "shop_cert"}
    wanted = replace(spec, task_template=template, labels=labels)
    (found,) = ask(state, lambda rehearsal: deploy(rehearsal, wanted)).services
    assert (found.name, found.before, found.after, found.missing) == ("web", 0, 2, ())
    with pytest.raises(InvalidArgument):
        ask(state, lambda rehearsal: deploy(rehearsal, replace(wanted, name="-web")))


def test_nodes_are_named_by_name_or_label() -> None:
    state = a_state(
        *(node(id, labels={"zone": zone}) for id, zone in (("w1", "a"), ("w2", "b"), ("w3", "b")))
    )
    assert nodes_named(state, "w1") == ("w1",)
    assert nodes_named(state, "zone=b") == ("w2", "w3")
    assert nodes_named(state, "node.labels.zone=a") == ("w1",)
    for word, error in (("w9", NotFound), ("zone=c", NotFound), ("=b", InvalidArgument)):
        with pytest.raises(error):
            nodes_named(state, word)


def test_a_quorum_is_lost_with_half_of_the_managers() -> None:
    status = ManagerStatus(reachability=Reachability.REACHABLE)
    managers = [replace(node(id, role=NodeRole.MANAGER), manager_status=status) for id in ("m1", "m2", "m3")]
    state = a_state(*managers, node("w1"))
    assert quorum_after(state, [NodeId("w1"), NodeId("m1")]) == (2, 2)
    assert quorum_after(state, [NodeId("m1"), NodeId("m2")]) == (1, 2)
