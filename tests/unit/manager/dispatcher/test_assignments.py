"""The assignments that a node gets, and when."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.aio.clock import SystemClock
from skep.manager.dispatcher.assignments import SentState, affects_node, difference, everything
from skep.model.container import ConfigReference, ContainerSpec, FileTarget, SecretReference
from skep.model.options.labels import DRAIN, LAST_LINES, ON_DISCONNECT, ON_DISCONNECT_DELAY, drain_s
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Endpoint, EndpointSpec, PortConfig, PublishMode, Service, TaskSpec
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ConfigId, NodeId, SecretId
from skep.model.values.meta import Driver
from skep.model.values.times import timestamp
from skep.store.interface import Transaction
from skep.store.kinds import Payload, previous_registry_auth_id, registry_auth_id
from skep.store.memory import MemoryCluster, MemoryStore
from skep.store.transactions.proposal import Proposal
from tests.support.builders import a_service, a_service_spec, a_task, an_auth
from tests.support.store.damage_rigs import damage

N1 = NodeId("n1")
replace = msgspec.structs.replace


async def store_with(*objects: msgspec.Struct) -> MemoryStore:
    store = MemoryStore(SystemClock())
    await put(store, *objects)
    return store


async def put(store: MemoryStore, *objects: msgspec.Struct) -> None:
    await store.update(lambda tx: [tx.put(object) for object in objects])


def with_state(task: Task, state: TaskState) -> Task:
    return replace(task, status=TaskStatus(state=state))


def needy_service(name: str = "web"):
    """A service whose tasks need secret s1 and config c1, and both."""
    container = ContainerSpec(
        image="busybox:1",
        secrets=(SecretReference(file=FileTarget(name="s"), secret_id=SecretId("s1"), secret_name="key"),),
        configs=(ConfigReference(file=FileTarget(name="c"), config_id=ConfigId("c1"), config_name="conf"),),
    )
    spec = replace(a_service_spec(name), task_template=TaskSpec(container_spec=container))
    return (
        Secret(id=SecretId("s1"), spec=SecretSpec(name="key")),
        Payload(id="secret/s1", data=b"hidden"),
        Config(id=ConfigId("c1"), spec=ConfigSpec(name="conf", data=b"plain")),
        a_service(name, spec=spec),
    )


async def test_a_node_gets_its_own_tasks_from_assigned_on_including_ended_ones():
    service = a_service()
    tasks = [
        a_task("pending", node="n1", service=service, state=TaskState.PENDING),
        a_task("assigned", node="n1", service=service, state=TaskState.ASSIGNED),
        a_task("failed", node="n1", service=service, state=TaskState.FAILED),
        a_task("elsewhere", node="n2", service=service, state=TaskState.RUNNING),
    ]
    store = await store_with(service, *tasks)
    change, sent = everything(store.view(), N1)
    assert change.complete
    assert change.revision == store.view().revision
    assert [assigned.task.id for assigned in change.tasks] == ["assigned", "failed"]
    assert change.tasks[1].task.status.state is TaskState.FAILED
    assert sorted(sent.tasks) == ["assigned", "failed"]


async def test_a_task_comes_with_what_its_node_needs_to_know_of_the_service():
    port = PortConfig(target_port=80, published_port=30000)
    service = replace(a_service("web", ports=(PortConfig(target_port=80),)), endpoint=Endpoint(ports=(port,)))
    store = await store_with(service, a_task("t1", node="n1", service=service))
    (assigned,) = everything(store.view(), N1)[0].tasks
    assert assigned.name.startswith("web.1.")
    assert assigned.ports == (port,)


async def test_tasks_of_a_removed_service_do_not_wait_for_their_clients():
    service = replace(a_service(), removed_at=timestamp(1))
    store = await store_with(service, a_task("t1", node="n1", service=service, state=TaskState.RUNNING))
    change, _ = everything(store.view(), N1)
    assert drain_s(change.tasks[0].service_labels) == 0.0


async def test_a_task_has_the_host_ports_of_its_own_spec_after_an_update_of_its_service():
    """It was assigned before the update and is sent after it.  Its node has a place for the former port."""
    ports = [
        PortConfig(target_port=number, published_port=8000 + number, publish_mode=PublishMode.HOST)
        for number in (80, 90)
    ]
    store = await store_with(a_service("web", ports=(ports[0],)))
    service = store.view().get(Service, "web")
    task = replace(a_task("t1", node="n1", service=service), spec_version=service.spec_version)
    spec = replace(service.spec, endpoint_spec=EndpointSpec(ports=(ports[1],)))
    await put(store, task, replace(service, spec=spec, endpoint=Endpoint(ports=(ports[1],))))
    (assigned,) = everything(store.view(), N1)[0].tasks
    assert assigned.ports == (ports[0],)


async def test_ports_without_an_allocation_are_sent_as_in_the_spec():
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    service = a_service("web", ports=(port,))
    assert service.spec.endpoint_spec == EndpointSpec(ports=(port,))
    store = await store_with(service, a_task("t1", node="n1", service=service))
    (assigned,) = everything(store.view(), N1)[0].tasks
    assert assigned.ports == (port,)


async def test_secrets_and_configs_come_once_and_go_with_the_last_task_that_runs():
    *needs, service = needy_service()
    first = a_task("t1", node="n1", service=service, state=TaskState.ASSIGNED)
    second = a_task("t2", node="n1", slot=2, service=service, state=TaskState.ASSIGNED)
    store = await store_with(*needs, service, first)
    change, sent = everything(store.view(), N1)
    assert [(secret.id, secret.name, secret.data) for secret in change.secrets] == [("s1", "key", b"hidden")]
    assert [(config.id, config.name, config.data) for config in change.configs] == [("c1", "conf", b"plain")]

    await put(store, second)
    change, sent = difference(store.view(), N1, sent, ["t2"])
    assert (change.secrets, change.configs) == ((), ())

    await put(store, with_state(first, TaskState.FAILED))
    change, sent = difference(store.view(), N1, sent, ["t1"])
    assert change is None

    await put(store, with_state(second, TaskState.COMPLETE))
    change, sent = difference(store.view(), N1, sent, ["t2"])
    assert (change.tasks, change.removed_tasks) == ((), ())
    assert (change.removed_secrets, change.removed_configs) == (("s1",), ("c1",))


async def test_a_secret_without_data_is_not_sent_as_an_empty_one():
    secret, _, config, service = needy_service()
    secret = replace(secret, spec=replace(secret.spec, driver=Driver(name="vault")))
    store = await store_with(
        secret, config, service, a_task("t1", node="n1", service=service, state=TaskState.ASSIGNED)
    )
    change, _ = everything(store.view(), N1)
    assert [assigned.task.id for assigned in change.tasks] == ["t1"]
    assert change.secrets == ()


async def test_registry_credentials_go_to_tasks_that_may_still_pull():
    service = a_service()
    running = a_task("t1", node="n1", service=service, state=TaskState.ASSIGNED)
    ended = a_task("t2", node="n1", service=service, state=TaskState.FAILED)
    store = await store_with(service, running, ended, Payload(id=f"registry/{service.id}", data=b"e30="))
    assert everything(store.view(), N1)[0].registry_auths == {"t1": "e30="}


async def test_a_run_of_the_spec_before_has_the_credentials_of_its_own_registry():
    """The run of a scheduled job goes on with its spec while the service has another one already."""
    service = a_service("nightly", image="old.corp/job:1")
    old = a_task("t1", node="n1", service=service, state=TaskState.ASSIGNED)
    auths = {name: an_auth(address=f"{name}.corp") for name in ("old", "new")}
    store = await store_with(
        service,
        old,
        Payload(id=registry_auth_id(service.id), data=auths["new"].encode()),
        Payload(id=previous_registry_auth_id(service.id), data=auths["old"].encode()),
    )

    def update(tx: Transaction) -> None:
        present = tx.get(Service, service.id)
        spec = a_service("nightly", image="new.corp/job:2").spec
        tx.put(replace(present, spec=spec, previous_spec=present.spec))

    await store.update(update)
    new = a_task("t2", slot=2, node="n1", service=store.view().get(Service, service.id))
    new = replace(new, status=replace(new.status, state=TaskState.ASSIGNED))
    await store.update(lambda tx: tx.put(new))
    assert everything(store.view(), N1)[0].registry_auths == {"t1": auths["old"], "t2": auths["new"]}


async def test_a_changed_desired_state_is_sent_and_a_report_is_not():
    service = a_service()
    task = a_task("t1", node="n1", service=service, state=TaskState.ASSIGNED)
    store = await store_with(service, task)
    _, sent = everything(store.view(), N1)
    await put(store, with_state(task, TaskState.RUNNING))
    nothing, sent = difference(store.view(), N1, sent, ["t1"])
    assert nothing is None
    await put(store, replace(with_state(task, TaskState.RUNNING), desired_state=TaskState.SHUTDOWN))
    change, sent = difference(store.view(), N1, sent, ["t1"])
    assert [assigned.task.desired_state for assigned in change.tasks] == [TaskState.SHUTDOWN]
    assert not change.complete


def labeled(service: Service, **labels: str) -> Service:
    return replace(service, spec=replace(service.spec, labels=labels))


@pytest.mark.parametrize("name", [ON_DISCONNECT, ON_DISCONNECT_DELAY, DRAIN, LAST_LINES])
async def test_a_label_that_takes_effect_on_a_running_task_is_sent_when_it_changes(name):
    service = a_service()
    store = await store_with(service, a_task("t1", node="n1", service=service), a_task("t2", node="n1"))
    _, sent = everything(store.view(), N1)
    for labels in ({name: "1"}, {name: "2"}, {}):
        await put(store, labeled(service, **labels))
        change, sent = difference(store.view(), N1, sent, ["t1"])
        assert [(one.task.id, one.service_labels) for one in change.tasks] == [("t1", labels)]
        assert difference(store.view(), N1, sent, ["t1"])[0] is None
        _, fresh = everything(store.view(), N1)
        assert {id: labels for id, labels in fresh.labels.items() if id == "t1"} == sent.labels
    await put(store, labeled(service, tier="front"))
    assert difference(store.view(), N1, sent, ["t1", "t2"])[0] is None


async def test_labels_of_a_service_that_cannot_be_read_stay_as_they_were_sent():
    service, cluster = labeled(a_service(), **{ON_DISCONNECT: "stop"}), MemoryCluster()
    task = a_task("t1", node="n1", service=service)
    store = MemoryStore(SystemClock(), cluster)
    await put(store, service, task)
    _, sent = everything(store.view(), N1)
    damage(cluster, "service", "web", "")
    unread = MemoryStore(SystemClock(), cluster)
    assert unread.view().lookup(Service, "web") is None
    change, now = difference(unread.view(), N1, sent, ["t1"])
    assert change is None
    assert now.labels == {"t1": {ON_DISCONNECT: "stop"}}


async def test_a_deleted_task_is_taken_back():
    service = a_service()
    store = await store_with(service, a_task("t1", node="n1", service=service))
    _, sent = everything(store.view(), N1)
    await store.update(lambda tx: tx.delete(Task, "t1"))
    change, sent = difference(store.view(), N1, sent, ["t1", "t1", "never-was"])
    assert change.removed_tasks == ("t1",)
    assert sent.tasks == {}


def test_only_changes_that_concern_the_node_matter():
    task = a_task("t1", node="n1", state=TaskState.ASSIGNED)
    assert not affects_node(task, with_state(task, TaskState.PREPARING))
    assert not affects_node(task, replace(task, updated_at=a_task("t2").created_at))
    assert affects_node(task, with_state(task, TaskState.FAILED))  # its secrets may go
    assert affects_node(with_state(task, TaskState.PENDING), task)
    assert affects_node(task, replace(task, desired_state=TaskState.SHUTDOWN))


STATES = st.sampled_from([TaskState.PENDING, TaskState.ASSIGNED, TaskState.RUNNING, TaskState.FAILED, None])
STEPS = st.lists(
    st.tuples(st.sampled_from(["t1", "t2", "t3"]), STATES, st.sampled_from(["n1", "n2"])), max_size=12
)


@given(STEPS)
def test_differences_add_up_to_everything(steps):
    """Whatever happens, a node that applied all messages knows what a fresh stream would tell it."""
    import asyncio

    async def play() -> None:
        *needs, service = needy_service()
        store = await store_with(*needs, service)
        change, sent = everything(store.view(), N1)
        tasks: set[str] = set()
        secrets: set[str] = set()
        for id, state, node in steps:
            exists = store.view().lookup(Task, id) is not None
            if state is not None:
                await put(store, a_task(id, node=node, service=service, state=state))
            elif exists:
                await store.update(lambda tx, gone=id: tx.delete(Task, gone))
            change, sent = difference(store.view(), N1, sent, [id])
            if change is None:
                continue
            tasks |= {assigned.task.id for assigned in change.tasks}
            tasks -= set(change.removed_tasks)
            secrets |= {secret.id for secret in change.secrets}
            secrets -= set(change.removed_secrets)
        fresh, known = everything(store.view(), N1)
        assert (
            tasks == {assigned.task.id for assigned in fresh.tasks} == known.tasks.keys() == sent.tasks.keys()
        )
        assert secrets == {secret.id for secret in fresh.secrets}
        assert sent == SentState(tasks=known.tasks, secrets=known.secrets, configs=known.configs)

    asyncio.run(play())


async def test_a_task_that_may_wait_is_sent_once_its_status_can_be_read_and_stays_where_it_was_sent():
    service, cluster = a_service(), MemoryCluster()
    may_wait = replace(a_task("may-wait", node="n1", service=service, state=TaskState.PENDING), slot=0)
    begun = a_task("begun", node="n1", service=service, state=TaskState.RUNNING)
    before = MemoryStore(SystemClock(), cluster)
    await put(before, service, may_wait, begun)
    for task in (may_wait, begun):
        damage(cluster, "task", task.id, "status")
    store = MemoryStore(SystemClock(), cluster)
    change, sent = everything(store.view(), N1)
    assert [assigned.task.id for assigned in change.tasks] == ["begun"]
    assert not change.complete
    unread = store.view().get(Task, may_wait.id)
    assert difference(store.view(), N1, sent, [may_wait.id])[0] is None
    was_sent = replace(sent, tasks={**sent.tasks, may_wait.id: unread})
    assert difference(store.view(), N1, was_sent, [may_wait.id])[0] is None

    await put(store, with_state(may_wait, TaskState.ASSIGNED))
    assert affects_node(unread, store.view().get(Task, may_wait.id))
    change, sent = difference(store.view(), N1, sent, [may_wait.id])
    assert change is not None
    assert [assigned.task.id for assigned in change.tasks] == ["may-wait"]


@pytest.mark.parametrize("wanted", [TaskState.RUNNING, TaskState.COMPLETE])
async def test_a_task_whose_spec_cannot_be_read_is_not_sent_unless_its_service_has_the_same(wanted) -> None:
    """An empty spec would be another container.  What the node has stays, and is stopped when that is wanted."""
    cluster = MemoryCluster()
    store = MemoryStore(SystemClock(), cluster)
    *needed, web = needy_service()
    await put(store, *needed, web, needy_service("db")[-1])
    tasks = []
    for name in ("web", "db"):
        service = store.view().get(Service, name)
        task = a_task(f"of-{name}", node="n1", service=service, state=TaskState.RUNNING)
        tasks.append(replace(task, spec_version=service.spec_version, desired_state=wanted))
        await put(store, tasks[-1])
    _, sent = everything(store.view(), N1)
    db = store.view().get(Service, "db")
    await put(store, replace(db, spec=a_service_spec("db", image="app:2")))
    for task in tasks:
        damaged = f"o/spec/{task.service_id}/{task.spec_version.index}"
        cluster.commit(Proposal(puts=((damaged, b"{"),)), None)
    unread = MemoryStore(SystemClock(), cluster)

    change, now = everything(unread.view(), N1)
    assert [(one.task.id, one.task.spec) for one in change.tasks] == [("of-web", web.spec.task_template)]
    assert not change.complete
    assert difference(unread.view(), N1, now, ["of-db"])[0] is None
    # The node was sent it before.
    change, kept = difference(unread.view(), N1, sent, ["of-db"])
    assert (change, kept.tasks["of-db"].spec) == (None, tasks[1].spec)
    assert kept.secrets == sent.secrets
    await put(unread, replace(unread.view().get(Task, "of-db"), desired_state=TaskState.SHUTDOWN))
    for before in (now, sent):
        change, _ = difference(unread.view(), N1, before, ["of-db"])
        assert change is not None
        assert [one.task.desired_state for one in change.tasks] == [TaskState.SHUTDOWN]


async def test_nothing_is_removed_from_a_node_while_a_status_that_was_pending_cannot_be_read():
    service, cluster = a_service(), MemoryCluster()
    task = replace(a_task("t1", node="n1", service=service, state=TaskState.PENDING), slot=0)
    store = MemoryStore(SystemClock(), cluster)
    await put(store, service, task)
    assert everything(store.view(), N1)[0].complete
    damage(cluster, "task", task.id, "status")
    change, _ = everything(store.view(), N1)
    assert not change.tasks
    assert not change.complete
