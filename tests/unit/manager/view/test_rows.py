"""Rows say what the dashboard draws, and nothing more."""

import asyncio

import msgspec
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.view.building import RowBuilder, affected_by
from skep.manager.view.rows import node_row, stack_row, task_row
from skep.manager.view.table import CLUSTER_KEY, Key
from skep.model.node import EngineDescription, FailingPath, NodeState, NodeStatus
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.secret import Config, ConfigSpec
from skep.model.service import PortConfig, PublishMode, Resources
from skep.model.swarm import Freeze, Swarm
from skep.model.task import PortStatus, TaskState, TaskStatus
from skep.model.values.ids import ClusterId, ConfigId, NodeId
from skep.model.values.times import ZERO_TIME
from skep.store.interface import Updated
from skep.store.memory import MemoryStore
from skep.store.state import State
from tests.support.builders import a_node, a_service, a_task
from tests.support.store.store_transactions import put


def test_a_task_has_the_ports_that_its_node_gave_it() -> None:
    view = MemoryStore(SystemClock()).view()
    task = a_task("t1", service="s1", node="n1")
    plain = msgspec.to_builtins(task_row(view, task, is_current=True))
    assert "ports" not in plain, "10,000 tasks have none"
    port = PortConfig(target_port=80, published_port=32768, publish_mode=PublishMode.HOST)
    status = TaskStatus(state=TaskState.RUNNING, port_status=PortStatus(ports=(port,)))
    row = msgspec.to_builtins(task_row(view, replace(task, status=status), is_current=True))
    assert list(row["ports"]) == [{"published": 32768, "target": 80, "protocol": "tcp", "mode": "host"}]


def test_a_task_that_waits_for_a_node_does_not_take_the_nodes_of_its_slot_for_the_cluster() -> None:
    store = MemoryStore(SystemClock())
    service = a_service("web", reserve=Resources(nano_cpus=16 * 10**9))
    small = a_node("small", has=Resources(nano_cpus=10**9))
    large = a_node("large", has=Resources(nano_cpus=32 * 10**9))
    refused = "no suitable node (insufficient resources on 2 nodes)"
    before = a_task("t1", service=service, slot=1, node="small", state=TaskState.SHUTDOWN)
    task = a_task("t2", service=service, slot=1, state=TaskState.PENDING)
    task = replace(task, node_id=NodeId(""), status=TaskStatus(state=TaskState.PENDING, err=refused))
    for one in (service, small, large, before, task):
        asyncio.run(store.update(put, one))
    assert task_row(store.view(), task, is_current=True).error == f"needs 16 CPUs; {refused}"


def test_a_node_has_the_paths_that_fail_and_the_volumes_with_data() -> None:
    node = a_node("n1")
    label = "data=shop_db.1@1763894400000 logs=web.2@1763894500000"
    engine = replace(node.description.engine, labels={"skep.slot-volumes": label})
    failing = FailingPath(peer=NodeId("n2"), hostname="w2", check="overlay", port="4789/udp")
    node = replace(
        node,
        status=NodeStatus(state=NodeState.READY),
        description=replace(node.description, engine=engine),
        failing_paths=(failing,),
    )
    row = node_row(node)
    assert [(one.peer, one.check, one.port) for one in row.failing_checks] == [("w2", "overlay", "4789/udp")]
    assert [(one.name, one.service, one.slot) for one in row.volumes] == [
        ("logs", "web", 2),
        ("data", "shop_db", 1),
    ]
    down = replace(node, status=NodeStatus(state=NodeState.DOWN))
    assert node_row(down).failing_checks == (), "of a node that is down, they are of the past"


def test_a_stack_has_its_revisions_with_the_plan_and_the_end_of_each_deploy() -> None:
    store, builder = MemoryStore(SystemClock()), RowBuilder(SystemClock())

    def config(number: int, state: str) -> Config:
        labels = {
            "com.docker.stack.namespace": "shop",
            "skep.stack.revision": str(number),
            "skep.stack.state": state,
            "skep.stack.changes": f"{number} updated",
        }
        spec = ConfigSpec(name=f"shop_revision-{number}", labels=labels, data=b"hidden")
        return Config(id=ConfigId(f"c{number}"), spec=spec, created_at="2026-01-01T00:00:00Z")

    for number, state in ((1, "deployed"), (3, "failed: no node"), (2, "deployed")):
        asyncio.run(store.update(put, config(number, state)))
        row, touched = builder.row(store.view(), Key("configs", f"c{number}"))
        assert (row, touched) == (None, {Key("stacks", "shop")})
    row, _ = builder.row(store.view(), Key("stacks", "shop"))
    stack = msgspec.to_builtins(row)
    assert stack["revision"] == 3
    assert [(one["number"], one["state"], one["changes"]) for one in stack["revisions"]] == [
        (3, "failed: no node", "3 updated"),
        (2, "deployed", "2 updated"),
        (1, "deployed", "1 updated"),
    ]
    assert "hidden" not in str(stack)
    assert stack_row("shop", (), ()).revision is None


def test_what_looks_like_a_credential_is_masked() -> None:
    node = a_node("n1")
    labels = {"zone": "a", "db-password": "hidden", "proxy": "http://ann:hidden@proxy:3128"}
    status = NodeStatus(
        state=NodeState.READY, message="cannot start DB_PASSWORD=hidden https://bob:hidden@host/x"
    )
    shown = msgspec.json.encode(
        node_row(replace(node, spec=replace(node.spec, labels=labels), status=status))
    )
    assert b"hidden" not in shown, shown
    assert b'"zone":"a"' in shown
    assert b"cannot start" in shown


def test_slots_that_have_used_volumes_of_a_node_change_its_row_alone() -> None:
    node = a_node("n1")
    engine = EngineDescription(labels={SLOT_VOLUMES_LABEL: "data=web.1@1"})
    other = replace(node, description=replace(node.description, engine=engine))
    assert [*affected_by(Updated(node, other), State())] == [Key("nodes", "n1")]


def test_a_freeze_of_replacement_changes_the_rows_of_tasks_on_lost_nodes() -> None:
    store = MemoryStore(SystemClock())
    lost, task = a_node("n1", state=NodeState.DOWN), a_task("t1", service="s1", node="n1")
    for one in (lost, a_node("n2"), task, a_task("t2", service="s2", node="n2")):
        asyncio.run(store.update(put, one))
    swarm = Swarm(id=ClusterId("c"))
    frozen = replace(swarm, freeze=Freeze(since=ZERO_TIME, nodes=(lost.id,), ready_before=2))
    cluster, *others = affected_by(Updated(swarm, frozen), store.view())
    assert cluster == CLUSTER_KEY
    assert others == [Key("tasks", "t1"), Key("services", "s1")]
    assert [*affected_by(Updated(frozen, replace(frozen, id=ClusterId("d"))), store.view())] == [CLUSTER_KEY]
