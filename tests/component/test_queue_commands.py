"""A queue's length by a command in a container: from the leader over a tunnel to the node, which runs and bounds it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.engine.containers.container import Exec, ExecConfig, StandardStream
from skep.manager.control.validation.new_objects import known_task
from skep.manager.queries.board import AskedQuery
from skep.manager.queries.node_questions import NodeQuestions
from skep.model.container import ContainerSpec, Mount
from skep.model.measures.queries import MetricQuery, QueryFailed
from skep.model.node import Node, NodeState
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.service import Service
from skep.model.task import ContainerStatus, Task, TaskState
from skep.model.values.ids import ContainerId, NodeId, ServiceId
from skep.model.values.stacks import STACK_LABEL
from skep.node import container_access
from skep.node.container_access import TaskContainers
from skep.node.events import NodeEvents
from skep.store.interface import Transaction, View
from tests.support.builders import a_service, a_service_spec, a_task
from tests.support.managers.fake_worker import FakeWorker
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_worker, an_agent_of, put, until

CONTAINER = ContainerId("c" * 64)
QUEUE = MetricQuery(command=("llen", "jobs"), service="queue")


@dataclass
class Execs:
    """The execs of an engine.  Commands write ``output``, and end unless ``hangs``."""

    output: list[tuple[StandardStream, bytes]] = field(default_factory=list)
    exit_code: int = 0
    hangs: bool = False
    commands: list[tuple[str, ...]] = field(default_factory=list)
    killed: int = 0
    at_once: int = 0
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self._ended = asyncio.Event()

    def create(self, _id: ContainerId, config: ExecConfig) -> str:
        self.commands.append(config.command)
        return "e1"

    async def start(self, _id: str, on_begin: Any) -> "Execs":
        on_begin()
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self._pieces = list(self.output)
        return self

    async def read(self) -> tuple[StandardStream, bytes] | None:
        await asyncio.sleep(0.02)
        if self.hangs:
            await self._ended.wait()
        return self._pieces.pop(0) if self._pieces else None

    def close(self) -> None:
        self.at_once -= 1

    async def wait(self, _id: str) -> Exec:
        return replace(self.get(""), exit_code=self.exit_code)

    def get(self, _id: str) -> Exec:
        config = ExecConfig(command=("llen",))
        return Exec(id="e1", container_id=CONTAINER, config=config, running=self.hangs)

    def kill(self, _id: str) -> None:
        self.killed += 1
        self._ended.set()

    def drop(self, _id: str) -> None:
        pass


class Engine:
    """An engine with the container of the task ``t1``."""

    def __init__(self, execs: Execs, labels: dict[str, str]) -> None:
        self.execs = execs
        self.id = CONTAINER
        self.labels = {LABEL_TASK_ID: "t1", **labels}

    def get(self, _word: str) -> "Engine":
        return self


def a_member(name: str, stack: str = "shop") -> Service:
    labels = {STACK_LABEL: stack} if stack else {}
    return a_service(name, spec=replace(a_service_spec(name), labels=labels))


def running(service: Service, node: NodeId) -> Task:
    task = a_task("t1", service=service, node=node, state=TaskState.RUNNING)
    status = replace(task.status, container_status=ContainerStatus(container_id=CONTAINER))
    return replace(task, status=status)


@asynccontextmanager
async def questions(
    tmp_path: Path, execs: Execs, labels: dict[str, str] | None = None
) -> AsyncIterator[tuple[NodeQuestions, Cluster]]:
    """Run the service shop_queue on a node, with shop_worker and another stack beside it."""
    async with Cluster().serving() as cluster:
        pair = await a_worker(cluster, tmp_path)
        engine = cast("Any", Engine(execs, labels or {}))
        access = TaskContainers(engine, NodeEvents(SystemClock()), cast("Any", None))
        peers = [KnownManager(MANAGER_ID, cluster.address)]
        async with an_agent_of(peers, pair, tmp_path, FakeWorker(), Random(1), containers=access) as agent:
            tunnels = cast("Any", cluster).tunnels
            await until(lambda: agent.node_id in tunnels.streams)
            await cluster.until(lambda view: view.get(Node, agent.node_id).status.state is NodeState.READY)
            queue = a_member("shop_queue")
            await put(
                cluster,
                queue,
                a_member("shop_worker"),
                a_member("other_worker", "other"),
                a_member("queue", ""),
            )
            await put(cluster, running(queue, agent.node_id))
            yield NodeQuestions(tunnels, cluster.store.view, Random(1), rights), cluster


def rights(view: View, task: Task) -> str:
    return known_task(view, task).machine_rights


def asked(by: str = "shop_worker", query: MetricQuery = QUEUE) -> AskedQuery:
    return AskedQuery(query, is_trusted=False, service_id=ServiceId(by))


async def failure(execs: Execs, tmp_path: Path, **labels: str) -> str:
    named = {f"skep.{name}": text for name, text in labels.items()}
    async with questions(tmp_path, execs, named) as (made, _):
        with pytest.raises(QueryFailed) as found:
            await made.run_command(asked())
    return str(found.value)


async def test_the_first_line_of_the_output_is_the_length(tmp_path: Path) -> None:
    execs = Execs([(StandardStream.STDERR, b"warning\n"), (StandardStream.STDOUT, b" 42\nmore\n")])
    async with questions(tmp_path, execs) as (made, _):
        assert await made.run_command(asked()) == 42.0
        assert await made.run_command(asked("shop_queue", replace(QUEUE, service=""))) == 42.0
    assert execs.commands == [("llen", "jobs")] * 2


async def test_one_command_at_a_time_runs_in_a_service(tmp_path: Path) -> None:
    execs = Execs([(StandardStream.STDOUT, b"1")])
    async with questions(tmp_path, execs) as (made, _), asyncio.TaskGroup() as group:
        for by in ("shop_worker", "shop_queue", "shop_worker"):
            group.create_task(made.run_command(asked(by)))
    assert (len(execs.commands), execs.most_at_once) == (3, 1)


@pytest.mark.parametrize(
    ("output", "exit_code", "reason"),
    [
        (b"", 127, "ended with exit code 127: run it with skep exec"),
        (b"many\n", 0, "first line of its command's output is not a number"),
        (b"-1", 0, "the figure is -1, which cannot be used"),
        (b"nan", 0, "the figure is nan"),
        (b"9" * 1_000_000, 0, "9"),
    ],
)
async def test_a_command_without_a_length_fails_with_its_reason(
    tmp_path: Path, output: bytes, exit_code: int, reason: str
) -> None:
    execs = Execs([(StandardStream.STDOUT, output)], exit_code)
    if len(output) > 4096:  # a bounded part of it is read
        async with questions(tmp_path, execs) as (made, _):
            assert await made.run_command(asked()) == float("9" * 64)
        return
    assert reason in await failure(execs, tmp_path)


async def test_a_command_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_access, "COMMAND_S", 0.1)
    execs = Execs(hangs=True)
    assert "took longer than 0.1 s" in await failure(execs, tmp_path)
    assert execs.killed == 1


async def test_a_service_in_which_only_administrators_may_run_commands_has_no_length(tmp_path: Path) -> None:
    execs = Execs([(StandardStream.STDOUT, b"1")])
    assert "skep.exec=none: only administrators" in await failure(execs, tmp_path, exec="none")
    assert execs.commands == []


@pytest.mark.parametrize(
    ("by", "query", "reason"),
    [
        ("other_worker", QUEUE, "stack other has no service queue: correct the label"),
        ("other_worker", replace(QUEUE, service="shop_queue"), "stack other has no service shop_queue"),
        ("other_worker", replace(QUEUE, service=""), "no task of service other_worker runs on a ready node"),
        ("queue", replace(QUEUE, service="shop_queue"), "services without a stack has no service shop_queue"),
        ("gone", QUEUE, "the service was removed"),
    ],
)
async def test_a_command_runs_in_the_own_stack_alone(
    tmp_path: Path, by: str, query: MetricQuery, reason: str
) -> None:
    execs = Execs([(StandardStream.STDOUT, b"1")])
    async with questions(tmp_path, execs) as (made, _):
        with pytest.raises(QueryFailed, match=reason):
            await made.run_command(asked(by, query))
    assert execs.commands == []


PRIVILEGED = {"skep.privileged": "true"}
BIND = Mount(type="bind", source="/", target="/host")


@pytest.mark.parametrize(
    "container", [ContainerSpec(labels=PRIVILEGED), ContainerSpec(mounts=(BIND,))], ids=["label", "mount"]
)
async def test_an_operators_command_runs_in_no_container_with_rights_over_its_machine(
    tmp_path: Path, container: ContainerSpec
) -> None:
    """An administrator's service in the operator's stack, in which an operator's ``docker exec`` is refused."""
    execs = Execs([(StandardStream.STDOUT, b"42")])
    async with questions(tmp_path, execs) as (made, cluster):

        def give(tx: Transaction) -> None:
            spec = tx.get(Service, "shop_queue").spec
            template = replace(spec.task_template, container_spec=container)
            service = tx.put(
                replace(tx.get(Service, "shop_queue"), spec=replace(spec, task_template=template))
            )
            tx.put(replace(tx.get(Task, "t1"), spec=template, spec_version=service.spec_version))

        await cluster.store.update(give)
        own = asked("shop_queue", replace(QUEUE, service=""))
        for one in (asked(), own):
            with pytest.raises(QueryFailed, match=r"shop_queue has .*: only an administrator may set "):
                await made.run_command(one)
        assert execs.commands == []
        assert await made.run_command(replace(asked(), is_trusted=True)) == 42.0, "an administrator's label"
