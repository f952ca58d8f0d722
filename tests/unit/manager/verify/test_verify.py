"""``skep verify``: each rule names a state that violates it, and states in transit are not reported."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import run_at_once
from skep.manager.notify.problems import LastBackup, problems_of_cluster
from skep.manager.routes.warnings import warnings_of
from skep.manager.telemetry.events import messages_of
from skep.manager.telemetry.metrics import violation_family
from skep.manager.verify.allocations import add_attached, mixed_networks
from skep.manager.verify.looks import StateLook
from skep.manager.verify.loop import InvariantCheck, Verifier
from skep.manager.verify.records import VIOLATIONS_ID, is_new, record, recorded, shown
from skep.manager.verify.rules import RULES, InvariantViolation
from skep.model.container import ContainerSpec, FileTarget, SecretReference
from skep.model.network import IPAMConfig, Network
from skep.model.node import NodeState
from skep.model.options.freezes import ChangeFreeze
from skep.model.options.labels import MIN_AVAILABLE
from skep.model.options.notifications import Topic
from skep.model.service import (
    JobStatus,
    NetworkAttachmentConfig,
    PortConfig,
    PublishMode,
    ReplicatedJob,
    Resources,
    Service,
    ServiceMode,
)
from skep.model.swarm import Swarm
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus, VolumeAttachment
from skep.model.values.ids import ClusterId, NetworkId, SecretId
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp
from skep.store.interface import Object, Updated
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import (
    a_cluster_volume,
    a_node,
    a_service,
    a_service_spec,
    a_task,
    an_overlay,
)
from tests.support.store.store_transactions import put as put_in

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _accepts_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write what the store would refuse, such as a second service of one name."""
    monkeypatch.setattr(LocalTransaction, "_claim", lambda *_: None)
    monkeypatch.setattr(LocalTransaction, "_refer", lambda *_: None)


def put(state: State, *objects: Object) -> None:
    for object in objects:
        owner = state.lookup(Service, object.service_id) if isinstance(object, Task) else None
        if owner is not None:
            object = replace(object, spec_version=owner.spec_version)
        tx = LocalTransaction(state, 0)
        tx.put(object)
        tx.adopt_into(state)


def a_state(*objects: Object) -> State:
    put(state := State(), *objects)
    return state


def seen(state: State, before: State | None = None) -> Sequence[InvariantViolation]:
    """Return what one look at ``state`` finds."""
    look = StateLook(state, {one.id: one for one in before.find(Task)} if before is not None else {})
    run_at_once(look.steps())
    return look.found


def texts(state: State) -> list[tuple[str, str]]:
    return [(one.rule, one.text) for one in seen(state)]


WEB = a_service("web", replicas=2)
GROWN = an_overlay("net1")
PLACE = NetworkAttachment(network=an_overlay("net1"), addresses=("10.0.1.9/24",))
JOB = replace(
    a_service("job"),
    spec=replace(
        a_service_spec("job"),
        mode=ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=4)),
    ),
    job_status=JobStatus(job_iteration=Version(index=1)),
)
PORT = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
PUBLISHED = a_service("proxy", replicas=2, ports=(PORT,))
PINNED = a_service("pinned", constraints=("node.labels.disk==ssd",))
LARGE = a_service("large", replicas=2, reserve=Resources(memory_bytes=6 * GIB))
SPARSE = a_service("sparse", replicas=2, max_replicas=1)
ATTACHED = a_service("attached")
ATTACHED = replace(
    ATTACHED,
    spec=replace(
        ATTACHED.spec,
        task_template=replace(
            ATTACHED.spec.task_template, networks=(NetworkAttachmentConfig(target=NetworkId("net1")),)
        ),
    ),
)
SECRET = SecretReference(secret_id=SecretId("gone"), secret_name="key", file=FileTarget(name="key"))
READER = a_service("reader")
READER = replace(
    READER,
    spec=replace(
        READER.spec,
        task_template=replace(READER.spec.task_template, container_spec=ContainerSpec(secrets=(SECRET,))),
    ),
)
DISK = a_cluster_volume()


def task(id: str, slot: int, node: str, service: Service, **fields: object) -> Task:
    return replace(a_task(id, slot=slot, node=node, service=service), **fields)


def run_of(id: str, slot: int) -> Task:
    return task(id, slot, "n1", JOB, job_iteration=Version(index=1), desired_state=TaskState.COMPLETE)


NODES = (a_node("n1"), a_node("n2"))
FORGED: dict[str, tuple[list[Object], str]] = {
    "slot": (
        [WEB, task("t1", 1, "n1", WEB), task("t2", 1, "n2", WEB)],
        "slot 1 of web is filled by ['t1', 't2']",
    ),
    "job": ([JOB, run_of("t1", 1), run_of("t2", 2)], "job job has 2 tasks under way, 1 may be"),
    "name": ([WEB, a_service("web", id="web2", replicas=2)], "name web belongs to ['web', 'web2']"),
    "address": (
        [
            an_overlay("net1"),
            WEB,
            task("t1", 1, "n1", WEB, networks_attachments=(PLACE,)),
            task("t2", 2, "n2", WEB, networks_attachments=(PLACE,)),
        ],
        "net1 10.0.1.9 is held by ['Task t1', 'Task t2']",
    ),
    "network": (
        [an_overlay("net1"), an_overlay("net2", subnet="10.0.1.128/25")],
        "networks net1 and net2 overlap: 10.0.1.0/24 and 10.0.1.128/25",
    ),
    "unreachable": (
        [an_overlay("net1"), ATTACHED, task("t1", 1, "n1", ATTACHED)],
        "task t1 has no address on ['net1']",
    ),
    "host-port": (
        [PUBLISHED, task("t1", 1, "n1", PUBLISHED), task("t2", 2, "n1", PUBLISHED)],
        "tasks t1 and t2 both hold [('tcp', 8080)] on n1",
    ),
    "overcommitted": (
        [LARGE, task("t1", 1, "n1", LARGE), task("t2", 2, "n1", LARGE)],
        "memory of n1 is over-committed",
    ),
    "copies": (
        [SPARSE, task("t1", 1, "n1", SPARSE), task("t2", 2, "n1", SPARSE)],
        "n1 has 2 copies of sparse",
    ),
    "constraints": (
        [PINNED, task("t1", 1, "n1", PINNED)],
        "task t1 of pinned is on n1, which does not meet its constraints",
    ),
    "volume": (
        [
            DISK,
            WEB,
            *(
                task(f"t{n}", n, f"n{n}", WEB, volumes=(VolumeAttachment(id=DISK.id, target="/d"),))
                for n in (1, 2)
            ),
        ],
        "n1 writes to volume id-orders with task t1, and n2 does with t2",
    ),
    "reference": ([READER], "secret key of reader was removed, and it uses it"),
    "leftover": ([a_task("t1", service="gone")], "task t1 is of a service that is gone"),
}


def test_a_subnet_that_was_added_to_a_removed_network_counts_while_tasks_use_it() -> None:
    """A task keeps the copy of its network from its allocation, so the first one knows the first subnet only."""
    assert GROWN.ipam_options is not None
    added = IPAMConfig(subnet="10.0.2.0/24", gateway="10.0.2.1")
    grown = replace(
        GROWN, ipam_options=replace(GROWN.ipam_options, configs=(*GROWN.ipam_options.configs, added))
    )
    copies = {"t1": (GROWN, "10.0.1.9/24"), "t2": (grown, "10.0.2.9/24")}
    networks: dict[str, Network] = {"net2": an_overlay("net2", subnet="10.0.2.0/24")}
    for number, (id, (network, address)) in enumerate(copies.items(), 1):
        place = NetworkAttachment(network=network, addresses=(address,))
        add_attached(task(id, number, "n1", WEB, networks_attachments=(place,)), networks)
    assert [one.text for one in mixed_networks(networks)] == [
        "networks net1 and net2 overlap: 10.0.2.0/24 and 10.0.2.0/24"
    ]


@pytest.mark.parametrize("rule", [one for one in RULES if one != "backwards"])
def test_a_forged_state_is_named_by_its_rule(rule: str) -> None:
    objects, text = FORGED[rule]
    assert texts(a_state(*NODES, *objects)) == [(rule, text)]
    assert texts(a_state(*NODES, *objects[:-1])) == [] or rule in ("constraints", "reference"), "one less"


def test_a_state_that_goes_back_is_named() -> None:
    before = a_state(*NODES, WEB, task("t1", 1, "n1", WEB))
    after = a_state(*NODES, WEB, a_task("t1", slot=1, node="n1", service=WEB, state=TaskState.READY))
    assert [one.text for one in seen(after, before)] == ["task t1 went back from running to ready"]
    assert [one.text for one in seen(before, before)] == []


@pytest.mark.parametrize(
    "keeps",
    [
        MIN_AVAILABLE,
        Swarm(
            id=ClusterId("c"),
            change_freezes={"": ChangeFreeze(until=Timestamp("2027-01-01T00:00:00Z"))},
        ),
    ],
)
def test_what_a_freeze_or_a_budget_keeps_in_place_is_no_violation(keeps: Swarm | str) -> None:
    labels = {keeps: "1"} if isinstance(keeps, str) else {}
    service = replace(PINNED, spec=replace(PINNED.spec, labels=labels))
    frozen = [keeps] if isinstance(keeps, Swarm) else []
    assert texts(a_state(*NODES, service, task("t1", 1, "n1", service), *frozen)) == []


def test_tasks_on_a_node_that_is_down_are_no_leftovers_and_overcommit_nothing() -> None:
    shrunk = replace(LARGE, spec=replace(LARGE.spec, mode=a_service_spec(replicas=1).mode))
    down = a_node("n1", state=NodeState.DOWN)
    assert texts(a_state(down, shrunk, task("t1", 1, "n1", LARGE), task("t2", 2, "n1", LARGE))) == []


class Steps(SystemClock):
    """A clock whose sleeps change the state instead of waiting."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self._steps = list(steps)
        self.slept = 0

    async def sleep(self, _: float) -> None:
        self.slept += 1
        if self._steps:
            self._steps.pop(0)()


TWICE = (*NODES, WEB, task("t1", 1, "n1", WEB), task("t2", 1, "n2", WEB))


def check(state: State, clock: Steps) -> list[str]:
    return [one.rule for one in asyncio.run(InvariantCheck(lambda: state, clock).run())]


def test_a_violation_that_lasts_is_reported_after_a_second_look() -> None:
    clock = Steps()
    assert check(a_state(*TWICE), clock) == ["slot"]
    assert clock.slept == 1


@pytest.mark.parametrize("kind", ["canary", "blue-green"])
def test_a_staged_update_may_have_two_tasks_in_a_slot(kind: str) -> None:
    staged = replace(WEB, spec=replace(WEB.spec, labels={"skep.update": kind}))
    assert check(a_state(*NODES, staged, *TWICE[-2:]), Steps()) == []


def test_an_old_task_may_serve_until_its_successor_starts_after_a_drain_that_was_undone() -> None:
    waiting = replace(TWICE[-1], status=TaskStatus(state=TaskState.PREPARING))
    state = a_state(*TWICE[:-1])
    put(state, waiting)
    assert check(state, Steps()) == ["slot"], "a move to another node keeps the version"
    web = state.get(Service, WEB.id)
    put(state, replace(web, spec=replace(web.spec, labels={"new": "1"})), waiting)
    assert check(state, Steps()) == []
    put(state, TWICE[-1])
    assert check(state, Steps()) == ["slot"]


def test_a_state_in_transit_is_not_reported() -> None:
    state = a_state(*TWICE)
    retired = replace(state.get(Task, "t1"), desired_state=TaskState.SHUTDOWN)
    assert check(state, Steps(lambda: put(state, retired))) == []


def test_objects_that_keep_changing_are_not_reported() -> None:
    state = a_state(*TWICE)

    def touch() -> None:
        task = state.get(Task, "t1")
        put(state, replace(task, labels={"n": str(state.revision)}))

    assert check(state, Steps(*[touch] * 9)) == []


def test_a_state_that_went_back_is_reported_although_it_is_seen_in_one_change_only() -> None:
    state, clock = a_state(*NODES, WEB, task("t1", 1, "n1", WEB)), Steps()
    checking = InvariantCheck(lambda: state, clock)
    assert asyncio.run(checking.run()) == []
    put(state, a_task("t1", slot=1, node="n1", service=WEB, state=TaskState.READY))
    assert [one.rule for one in asyncio.run(checking.run())] == ["backwards"]


def test_a_rule_that_raises_hides_no_other_violation() -> None:
    broken = replace(PLACE, addresses=("nonsense",))
    state = a_state(
        *NODES, WEB, task("t1", 1, "n1", WEB), task("t2", 1, "n2", WEB, networks_attachments=(broken,))
    )
    assert [one.rule for one in seen(state)] == ["slot"]


async def test_the_leader_records_violations_until_they_are_over() -> None:
    store, stopped = MemoryStore(SystemClock()), asyncio.Event()
    for object in TWICE:
        await store.update(put_in, object)

    class Clock(SystemClock):
        """The looks of the loop: twice with the violation, twice without it."""

        sleeps = 0

        async def sleep(self, _: float) -> None:
            self.sleeps += 1
            if self.sleeps == 3:
                assert recorded(store.view()).count == 1
                first = store.view().get(Task, "t1")
                await store.update(put_in, replace(first, desired_state=TaskState.SHUTDOWN))
            if self.sleeps == 4:
                stopped.set()
                await asyncio.Event().wait()

    running = asyncio.create_task(Verifier(store, Clock()).run())
    async with asyncio.timeout(10):
        await stopped.wait()
    running.cancel()
    assert recorded(store.view()).count == 0


async def test_a_recorded_violation_is_an_event_a_warning_a_metric_and_a_problem() -> None:
    store = MemoryStore(SystemClock())
    await store.update(put_in, Swarm(id=ClusterId("c")))
    found = shown(seen(a_state(*TWICE)))
    assert is_new(store.view(), found)
    await store.update(record, found, 5)
    assert not is_new(store.view(), found)
    payload = store.view().get(Payload, VIOLATIONS_ID)
    none = Payload(id=VIOLATIONS_ID, data=b"{}")
    began, ended = (
        [*messages_of(Updated(old, new), 5, store.view())] for old, new in ((none, payload), (payload, none))
    )
    text = "slot 1 of web is filled by ['t1', 't2']"
    assert [(one.type, one.action, one.actor.attributes["message"]) for one in (*began, *ended)] == [
        ("invariant", "violate", text),
        ("invariant", "recover", text),
    ]
    warnings = await warnings_of(store, 5)
    assert "WARNING: 1 invariant is violated (slot): run skep verify" in warnings
    assert {one.labels: one.value for one in violation_family(store.view()).samples}['{rule="slot"}'] == 1
    problems = [*problems_of_cluster(store.view(), LastBackup(), 0, 5)]
    assert [(one.topic, one.message) for one in problems] == [
        (Topic.INVARIANT, f"invariant slot is violated: {text}. Run skep verify")
    ]
