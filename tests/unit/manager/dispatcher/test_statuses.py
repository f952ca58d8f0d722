"""Which of two statuses of a task counts."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied, Unavailable
from skep.manager.dispatcher.node_sessions.adoption import OrphanedNode, adopt
from skep.manager.dispatcher.node_sessions.registration import (
    Registration,
    RegistrationRate,
    SessionInvalid,
    SilentNode,
    describe_node,
    mark_down,
    take_session,
)
from skep.manager.dispatcher.statuses import (
    STATUS_BYTES_MAX,
    StatusReport,
    bounded,
    newer_status,
    record_status,
)
from skep.manager.nodes.heartbeats import configured_grace_s
from skep.manager.routes.warnings import data_path_warnings
from skep.model.networks.data_planes import (
    DATA_PATH_LABEL,
    LOCAL_ADDRESSES_LABEL,
    NODE_LABEL,
    SEEN_NAT_LABEL,
    TUNNEL_LABEL,
    nat_of,
    tunnel_key,
    underlay_of,
)
from skep.model.networks.used_ports import ports_label
from skep.model.networks.wireguard import PublicKey, public_keys_label
from skep.model.node import EngineDescription, ManagerStatus, Node, NodeDescription, NodeState, NodeStatus
from skep.model.node_reports.conditions import condition_messages
from skep.model.node_reports.description_size import DESCRIPTION_BYTES_MAX
from skep.model.service import PortConfig
from skep.model.task import ContainerStatus, PortStatus, Task, TaskState, TaskStatus
from skep.model.values.encoding import to_json
from skep.model.values.ids import NodeId, SessionId, TaskId
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.memory import MemoryStore
from skep.store.state import State
from skep.store.transactions.proposal import Unchanged
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_node, a_service, a_task
from tests.unit.store.test_transaction import written

NOW_NS = 1_700_000_000 * SECOND_NS
STATUSES = st.builds(TaskStatus, state=st.sampled_from(TaskState), message=st.sampled_from(["", "x"]))


@pytest.mark.parametrize("ports", [0, 3, 150, 1024])
@pytest.mark.parametrize("name", ["", "web", "x" * 4096])
@pytest.mark.parametrize("text", ["", "x", "\0" * 10, "x" * 4096, "\0" * 4096, "\N{SNOWMAN}" * 4096])
def test_a_status_is_kept_as_far_as_there_is_room_for_it(text, name, ports):
    reported = tuple(PortConfig(name=name, target_port=n, published_port=30000 + n) for n in range(ports))
    status = TaskStatus(
        state=TaskState.RUNNING,
        message=text,
        err=text,
        container_status=ContainerStatus(container_id=text, pid=7),
        port_status=PortStatus(ports=reported),
    )
    kept = bounded(status)
    assert len(to_json(kept)) <= STATUS_BYTES_MAX <= 16 * 1024
    assert bounded(kept) == kept
    assert (kept.state, kept.container_status.pid) == (status.state, 7)
    assert text.startswith(kept.message)
    assert text.startswith(kept.err)
    if len(to_json(status)) <= STATUS_BYTES_MAX:
        assert kept == status
    if ports <= 150:
        assert [port.published_port for port in kept.port_status.ports] == [
            port.published_port for port in reported
        ]


def test_a_later_state_is_written():
    running, failed = TaskStatus(state=TaskState.RUNNING), TaskStatus(state=TaskState.FAILED)
    assert newer_status(running, failed) == failed
    assert newer_status(failed, running) is None


def test_new_details_of_the_same_state_are_written_until_the_task_has_ended():
    starting = TaskStatus(state=TaskState.STARTING)
    assert newer_status(starting, TaskStatus(state=TaskState.STARTING, message="pulling")) is not None
    assert newer_status(starting, starting) is None
    failed = TaskStatus(state=TaskState.FAILED, err="exit 1")
    assert newer_status(failed, TaskStatus(state=TaskState.FAILED, err="No such container")) is None


@pytest.mark.parametrize("state", [TaskState.NEW, TaskState.ASSIGNED, TaskState.REMOVE, TaskState.ORPHANED])
def test_states_that_are_not_the_nodes_to_say_are_passed_over(state):
    assert newer_status(TaskStatus(state=TaskState.NEW), TaskStatus(state=state)) is None


@given(st.lists(STATUSES))
def test_states_never_go_back_whatever_is_reported(reports):
    stored = TaskStatus(state=TaskState.ASSIGNED)
    for report in reports:
        after = newer_status(stored, report) or stored
        assert after.state >= stored.state
        stored = after


@given(st.permutations([TaskState.ACCEPTED, TaskState.PREPARING, TaskState.RUNNING, TaskState.FAILED]))
def test_the_order_of_reports_does_not_matter_for_where_a_task_ends(order):
    stored = TaskStatus(state=TaskState.ASSIGNED)
    for state in order:
        stored = newer_status(stored, TaskStatus(state=state)) or stored
    assert stored.state is TaskState.FAILED


def registration(session: str, address: str = "10.0.0.2", **description: str) -> Registration:
    return Registration(
        node_id=NodeId("n1"),
        manager_id=NodeId("m1"),
        session_id=SessionId(session),
        description=NodeDescription(**description),
        address=address,
    )


@pytest.fixture
async def store():
    store = MemoryStore(SystemClock())
    service = a_service()
    task = a_task("t1", node="n1", service=service, state=TaskState.ASSIGNED)
    await store.update(lambda tx: [tx.put(object) for object in (a_node("n1"), a_node("n2"), service, task)])
    return store


def report(session: str, node: str = "n1", task: str = "t1") -> StatusReport:
    return StatusReport(
        node_id=NodeId(node),
        session_id=SessionId(session),
        task_id=TaskId(task),
        status=TaskStatus(state=TaskState.RUNNING),
    )


async def test_only_the_present_session_speaks_for_a_node(store):
    await store.update(take_session, registration("a"))
    await store.update(take_session, registration("b"))
    with pytest.raises(SessionInvalid, match="session invalid"):
        await store.update(record_status, report("a"))
    assert await store.update(record_status, report("b"))
    assert store.view().get(Task, "t1").status.state is TaskState.RUNNING


async def test_a_node_speaks_only_for_its_own_tasks(store):
    await store.update(take_session, msgspec.structs.replace(registration("a"), node_id=NodeId("n2")))
    with pytest.raises(PermissionDenied, match="not assigned this node: t1"):
        await store.update(record_status, report("a", node="n2"))


async def test_a_task_that_is_gone_is_passed_over_in_silence(store):
    await store.update(take_session, registration("a"))
    assert not await store.update(record_status, report("a", task="gone"))


async def test_registering_describes_the_node_and_makes_it_ready(store):
    node = await store.update(take_session, registration("a", hostname="worker"))
    assert node.status.state is NodeState.READY
    assert node.status.addr == "10.0.0.2"
    assert node.description.hostname == "worker"
    assert node.session.manager_id == "m1"


async def test_a_managers_own_agent_is_known_by_the_managers_address(store):
    await store.update(
        lambda tx: tx.put(
            msgspec.structs.replace(tx.get(Node, "n1"), manager_status=ManagerStatus(addr="10.0.0.9:2377"))
        )
    )
    node = await store.update(take_session, registration("a", address="127.0.0.1"))
    assert node.status.addr == "10.0.0.9"


def test_a_session_relies_on_the_status_which_it_may_leave_as_it_is():
    """A replica that does not show yet that the node is down would take the session and leave it down."""
    ready = NodeStatus(state=NodeState.READY, addr="10.0.0.2")
    described = registration("a").description
    state = written(State(), msgspec.structs.replace(a_node("n1"), status=ready, description=described))
    tx = LocalTransaction(state, 0)
    take_session(tx, registration("a"))
    assert {"o/node/n1.session", "o/node/n1.status"} <= {
        one.key for one in tx.proposal().compares if isinstance(one, Unchanged)
    }


async def test_a_node_without_an_object_gets_no_session(store):
    gone = msgspec.structs.replace(registration("a"), node_id=NodeId("n9"))
    with pytest.raises(PermissionDenied, match="is not part of the swarm"):
        await store.update(take_session, gone)


async def test_an_absurd_description_is_cut(store):
    """As nodes of earlier versions send it, which do not cut it themselves."""
    await store.update(take_session, registration("a", hostname="x" * 100_000))
    node = store.view().get(Node, "n1")
    assert node.status.state is NodeState.READY
    assert node.description.hostname == "x" * 255
    (condition,) = condition_messages(node.description)
    assert "names and certificates" in condition
    labels = {"skep.ports": ports_label(("udp", number) for number in range(20000))}
    labels |= {"skep.devices": "/dev/x" * 12_000}
    description = msgspec.structs.replace(node.description, engine=EngineDescription(labels=labels))
    await store.update(describe_node, NodeId("n1"), SessionId("a"), description)
    described = store.view().get(Node, "n1").description
    assert len(to_json(described)) <= DESCRIPTION_BYTES_MAX
    assert "ports in use, devices" in condition_messages(described)[0]


async def test_a_silent_node_is_down_unless_it_has_registered_again(store):
    await store.update(take_session, registration("a"))
    assert await store.update(
        mark_down, SilentNode(node_id=NodeId("n1"), session_id=SessionId("a"), silent_s=3.0), NOW_NS
    )
    node = store.view().get(Node, "n1")
    assert node.status.state is NodeState.DOWN
    assert node.silent_since == timestamp(NOW_NS - 3 * SECOND_NS)
    await store.update(take_session, registration("b"))
    assert not await store.update(
        mark_down, SilentNode(node_id=NodeId("n1"), session_id=SessionId("a"), silent_s=3.0), NOW_NS
    )
    assert store.view().get(Node, "n1").status.state is NodeState.READY
    assert store.view().get(Node, "n1").silent_since is None


async def test_a_node_that_died_with_its_manager_was_not_heard_at_the_adoption(store):
    """Else labels that changed between its death and the adoption would count as received."""
    await store.update(take_session, registration("a"))
    session = store.view().get(Node, "n1").session
    orphan = OrphanedNode(node_id=NodeId("n1"), session=session, silence_s=600.0)
    minute = 60 * SECOND_NS
    for own, now_ns in (("m2", NOW_NS), ("m3", NOW_NS + minute)):
        orphan = replace(orphan, session=store.view().get(Node, "n1").session)
        assert await store.update(adopt, orphan, NodeId(own), lambda own=own: f"of-{own}", now_ns)
    silent = SilentNode(node_id=NodeId("n1"), session_id=SessionId("of-m3"), silent_s=5.0)
    assert await store.update(mark_down, silent, NOW_NS + 2 * minute)
    grace_s = configured_grace_s(store.view())
    heard = timestamp(NOW_NS - round((600.0 + grace_s) * SECOND_NS))
    assert store.view().get(Node, "n1").silent_since == heard
    # It has returned since then, so the next silence counts from its own last heartbeat.
    await store.update(take_session, registration("b"))
    silent = replace(silent, session_id=SessionId("b"))
    assert await store.update(mark_down, silent, NOW_NS + 3 * minute)
    assert store.view().get(Node, "n1").silent_since == timestamp(NOW_NS + 3 * minute - 5 * SECOND_NS)


def test_a_node_that_does_nothing_but_register_has_to_wait():
    rate = RegistrationRate()
    for second in range(5):
        rate.note(NodeId("n1"), float(second))
    with pytest.raises(Unavailable, match="registers too often"):
        rate.note(NodeId("n1"), 5.0)
    rate.note(NodeId("n2"), 5.0)
    rate.note(NodeId("n1"), 8.5)


def saying(node: str, address: str, label: str) -> Registration:
    labels = {NODE_LABEL: "true", **({DATA_PATH_LABEL: label} if label else {})}
    engine = EngineDescription(engine_version="1", labels=labels)
    wanted = registration("a", address)
    return msgspec.structs.replace(
        wanted, node_id=NodeId(node), description=NodeDescription(hostname=node, engine=engine)
    )


async def test_the_first_node_with_a_data_path_address_keeps_it(store):
    await store.update(take_session, saying("n1", "10.0.0.1", "10.9.0.1"))
    thief = await store.update(take_session, saying("n2", "10.0.0.2", "10.9.0.1"))
    assert underlay_of(thief) == "10.0.0.2"
    (warning,) = data_path_warnings(store.view().find(Node))
    assert warning.startswith("node n2: its data path address '10.9.0.1' belongs to another node")
    # As often as it says so; and a description in the middle of a session is no way around it.
    await store.update(
        describe_node, NodeId("n2"), SessionId("a"), saying("n2", "10.0.0.2", "10.9.0.1").description
    )
    assert underlay_of(store.view().get(Node, "n2")) == "10.0.0.2"
    first = await store.update(take_session, saying("n1", "10.0.0.1", "10.9.0.1"))
    assert underlay_of(first) == "10.9.0.1"


KEY = public_keys_label([PublicKey(bytes(range(32)), 4802)])


def with_labels(node: str, address: str, **labels: str) -> Registration:
    requested = saying(node, address, "")
    engine = requested.description.engine
    engine = msgspec.structs.replace(engine, labels={**engine.labels, "skep.paths": "1", **labels})
    return msgspec.structs.replace(
        requested, description=msgspec.structs.replace(requested.description, engine=engine)
    )


async def test_the_first_node_with_a_key_of_tunnels_keeps_it(store):
    """Also while it is down, and in whatever order the nodes joined."""
    copier = await store.update(take_session, with_labels("n1", "10.0.0.1"))
    owner = await store.update(take_session, with_labels("n2", "10.0.0.2", **{TUNNEL_LABEL: KEY}))
    await store.update(mark_down, SilentNode(node_id=NodeId("n2"), session_id=SessionId("a")), 0)
    same = KEY.replace("@4802", "@4803")
    copier = await store.update(take_session, with_labels("n1", "10.0.0.1", **{TUNNEL_LABEL: same}))
    assert tunnel_key(copier) is None
    (warning,) = data_path_warnings(store.view().find(Node))
    assert warning.startswith("node n1: its key of tunnels through NAT belongs to another node")
    owner = await store.update(take_session, with_labels("n2", "10.0.0.2", **{TUNNEL_LABEL: KEY}))
    assert tunnel_key(owner) is not None


async def test_a_nat_that_was_seen_is_remembered_until_the_machine_restarts(store):
    """Of two managers, one sees the node directly."""
    labels = {TUNNEL_LABEL: KEY, LOCAL_ADDRESSES_LABEL: "10.0.0.5/24"}
    forged = {SEEN_NAT_LABEL: "192.0.2.1"}
    before = await store.update(take_session, with_labels("n1", "10.0.0.5", **labels, **forged))
    assert nat_of(before) == ""
    for seen in ("198.51.100.7", "10.0.0.5", "2001:db8::7"):
        node = await store.update(take_session, with_labels("n1", seen, **labels))
        assert nat_of(node) == "198.51.100.7"
    key = public_keys_label([PublicKey(bytes(range(1, 33)), 4802)])
    node = await store.update(take_session, with_labels("n1", "10.0.0.5", **{**labels, TUNNEL_LABEL: key}))
    assert nat_of(node) == ""


async def test_the_address_of_a_node_that_is_down_is_free(store):
    await store.update(take_session, saying("n1", "10.0.0.1", "10.9.0.1"))
    await store.update(mark_down, SilentNode(node_id=NodeId("n1"), session_id=SessionId("a")), 0)
    other = await store.update(take_session, saying("n2", "10.0.0.2", "10.9.0.1"))
    assert underlay_of(other) == "10.9.0.1"


async def test_where_a_node_connects_from_no_other_takes(store):
    await store.update(take_session, saying("n2", "10.0.0.2", "10.0.0.1"))
    await store.update(take_session, saying("n1", "10.0.0.1", ""))
    (warning,) = data_path_warnings(store.view().find(Node))
    assert warning == (
        "node n2: its data path address 10.0.0.1 belongs to node n1, so its overlay networks reach no other node"
    )


async def test_an_address_of_no_machine_is_warned_of(store):
    await store.update(take_session, saying("n1", "10.0.0.1", "fe80::1%x"))
    (warning,) = data_path_warnings(store.view().find(Node))
    assert warning == "node n1: its data path address 'fe80::1%x' is not a machine's address and is not used"
