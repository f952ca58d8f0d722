"""The tasks of a node that was removed from its cluster stop: the cluster has replaced them."""

import asyncio
import time
from pathlib import Path
from typing import cast

import pytest
from msgspec.structs import replace

from skep.agent.executor.simulated import SimulatedController
from skep.agent.tasks.cluster_volumes import ClusterVolumes
from skep.agent.tasks.worker import kill_time, stop_reason
from skep.aio.clock import SystemClock
from skep.model.node_reports.node_removal import NodeRemoval
from skep.model.service import NetworkAttachmentSpec
from skep.model.task import AssignedTask, TaskState
from skep.model.values.ids import TaskId
from skep.model.values.times import Timestamp, timestamp, unix_ns
from skep.wire.client import ManagerChannel
from tests.support.harness.clocks import FastClock
from tests.unit.agent.test_worker import DEADLINE_S, NeverStops, Node, assigned, complete

REMOVED = NodeRemoval(at=Timestamp("2026-01-02T03:04:05Z"))
KEPT = replace(REMOVED, keeps_containers=True)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def a_plain_container(id: str) -> AssignedTask:
    task = assigned(id)
    attachment = NetworkAttachmentSpec(container_id="c")
    spec = replace(task.task.spec, container_spec=None, network_attachment_spec=attachment)
    return replace(task, task=replace(task.task, spec=spec))


def test_every_task_stops_but_those_of_plain_containers() -> None:
    assert REMOVED.summary in stop_reason(assigned("a"), 0.0, REMOVED)
    assert not stop_reason(a_plain_container("a"), 0.0, REMOVED)
    assert not stop_reason(assigned("a"), 0.0, KEPT)
    assert not stop_reason(assigned("a"), 1e9)


async def test_a_removed_node_stops_its_tasks_and_starts_none_again(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", TaskState.RUNNING)
        worker.session_state.end()
        worker.session_state.removal = REMOVED
        status = await node.reports.wait("a", TaskState.SHUTDOWN)
        assert "this node was removed from the cluster at 2026-01-02T03:04:05Z" in status.message
        assert node.machine.processes[TaskId("a")].exit_code == 143
    async with node.working() as worker:
        await worker.wait_ready()
        assert worker.statuses()[TaskId("a")].state is TaskState.SHUTDOWN


async def test_a_removed_node_that_is_to_keep_them_keeps_them(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", TaskState.RUNNING)
        worker.session_state.end()
        worker.session_state.removal = KEPT
        await asyncio.sleep(0.6)  # longer than between two checks
        assert worker.statuses()[TaskId("a")].state is TaskState.RUNNING


class FixedClock(SystemClock):
    def __init__(self, now: str) -> None:
        self._now_ns = unix_ns(Timestamp(now))

    def now_ns(self) -> int:
        return self._now_ns

    def monotonic(self) -> float:
        return 1000.0


@pytest.mark.parametrize(
    ("now", "left_s"),
    [
        ("2026-01-02T03:04:05Z", 20.0),
        ("2026-01-02T03:04:17Z", 8.0),  # its registration was postponed
        ("2026-01-02T03:05:00Z", 0.0),
        ("2026-01-02T03:00:00Z", 20.0),  # its clock is behind
    ],
)
def test_the_time_to_stop_counts_from_the_removal(now: str, left_s: float) -> None:
    assert kill_time(REMOVED, FixedClock(now)) == 1000.0 + left_s


class BusyVolumes:
    """Volumes of an earlier process that are not known yet."""

    async def wait_ready(self) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("has_busy_volumes", [False, True])
async def test_a_task_that_does_not_stop_is_killed_in_time(tmp_path: Path, has_busy_volumes: bool) -> None:
    """Managers publish a volume for one node elsewhere soon after."""
    node = Node(tmp_path, clock=FastClock(100))
    controllers: dict[str, type[SimulatedController]] = {"a": NeverStops}
    node.controllers |= controllers
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", TaskState.RUNNING)
        if has_busy_volumes:
            worker.volumes = cast("ClusterVolumes", BusyVolumes())
        worker.session_state.end()
        worker.session_state.removal = replace(REMOVED, at=timestamp(time.time_ns()))
        async with asyncio.timeout(DEADLINE_S):
            while node.machine.processes[TaskId("a")].exit_code != 137:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.01)


async def test_a_node_that_is_removed_again_after_a_short_session_has_its_tasks_killed_again(
    tmp_path: Path,
) -> None:
    node = Node(tmp_path, clock=FastClock(100))
    controllers: dict[str, type[SimulatedController]] = {"a": NeverStops, "b": NeverStops}
    node.controllers |= controllers
    async with node.working() as worker:
        for id in ("a", "b"):
            await worker.assign(complete(assigned(id)))
            await node.reports.wait(id, TaskState.RUNNING)
            worker.session_state.end()
            worker.session_state.removal = replace(REMOVED, at=timestamp(time.time_ns()))
            async with asyncio.timeout(DEADLINE_S):
                while node.machine.processes[TaskId(id)].exit_code != 137:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            worker.session_state.begin(cast("ManagerChannel", None))
