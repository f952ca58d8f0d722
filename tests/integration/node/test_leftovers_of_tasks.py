"""A task that was made ready and never ran leaves nothing on the network: no namespace, no address, no port."""

import asyncio
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.agent.executor.oci import OciExecutor
from skep.agent.session.reports import Reports
from skep.agent.tasks.task_files import TaskFiles
from skep.agent.tasks.worker import Worker
from skep.aio.clock import SystemClock
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.engine.containers.container import ContainerState
from skep.errors import SkepError
from skep.model.assignment import AssignmentSet
from skep.model.task import TaskState
from skep.model.values.ids import new_container_id
from tests.integration.node.conftest import eventually
from tests.integration.node.test_oci_tasks import a_task
from tests.support.engine.runc_lab import Lab
from tests.support.managers.fake_worker import a_session


def held(lab: Lab, executor: OciExecutor) -> set[str]:
    """The holders of namespaces and addresses."""
    pinned = lab.paths.netns.iterdir() if lab.paths.netns.exists() else ()
    return {*(one.name for one in pinned), *executor.data_plane.gateway.users()}


async def wait_until_something_is_held(lab: Lab, executor: OciExecutor) -> None:
    """Looks at every turn of the loop: what is being made is to be met in the middle."""
    for _ in range(1_000_000):
        if held(lab, executor):
            return
        await asyncio.sleep(0)
    raise AssertionError("nothing was made")


async def wait_until_nothing_is_left(lab: Lab, executor: OciExecutor) -> None:
    await eventually(lambda: not executor.engine.list(), "no container is left")
    assert not held(lab, executor)


async def test_a_task_that_is_retired_before_its_start_gives_its_network_back(
    lab: Lab, executor: OciExecutor
) -> None:
    task = a_task("sleep", "60")
    controller = executor.controller(task)
    await controller.prepare()
    assert len(held(lab, executor)) == 1
    await controller.shutdown()
    assert not held(lab, executor)
    container = executor.engine.get(f"web.2.{task.task.id}")
    assert container.state is ContainerState.CREATED, "its record stays until the task is removed"
    await controller.shutdown()
    await controller.remove()
    assert await executor.leftovers() == []


async def test_the_next_node_process_gives_a_retired_task_no_network_either(lab: Lab) -> None:
    task = a_task("sleep", "60")
    first = lab.executor()
    async with first.running():
        controller = first.controller(task)
        await controller.prepare()
        await controller.shutdown()
    second = lab.executor()
    async with second.running():
        assert [one.name for one in second.engine.list()] == [f"web.2.{task.task.id}"]
        assert not held(lab, second)


async def test_a_task_that_is_taken_away_while_it_is_made_ready_leaves_nothing(
    lab: Lab, tmp_path: Path
) -> None:
    """Its removal waits for what is being made: overtaking that, it would find nothing to free."""
    executor = lab.executor()
    files = TaskFiles(tmp_path / "tasks")
    worker = Worker(
        executor=executor, files=files, reports=Reports(), clock=SystemClock(), session_state=a_session()
    )
    running = asyncio.create_task(worker.run())
    try:
        await worker.wait_ready()
        task = a_task("sleep", "60")
        ready = replace(task, task=replace(task.task, desired_state=TaskState.READY))
        await worker.assign(AssignmentSet(complete=True, tasks=(ready,)))
        await wait_until_something_is_held(lab, executor)
        await worker.assign(AssignmentSet(complete=True, tasks=()))
        await wait_until_nothing_is_left(lab, executor)
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_container_that_is_removed_while_it_is_made_leaves_nothing(
    lab: Lab, executor: OciExecutor
) -> None:
    task = a_task("sleep", "60")
    making = asyncio.create_task(executor.controller(task).prepare())
    await wait_until_something_is_held(lab, executor)
    await executor.discard(task.task.id)
    await asyncio.wait([making])
    await wait_until_nothing_is_left(lab, executor)


async def test_a_network_that_cannot_be_written_down_is_given_back(lab: Lab, executor: OciExecutor) -> None:
    task = a_task("sleep", "60")
    making = asyncio.create_task(executor.controller(task).prepare())
    await wait_until_something_is_held(lab, executor)
    (container,) = executor.engine.list()
    shutil.rmtree(lab.paths.containers / container.id)  # nothing can be written there any more
    with pytest.raises(SkepError):
        await making
    await wait_until_nothing_is_left(lab, executor)


async def test_what_is_held_for_containers_that_are_gone_is_swept_away(
    lab: Lab, executor: OciExecutor
) -> None:
    kept = executor.controller(a_task("sleep", "60"))
    await kept.prepare()
    before = held(lab, executor)
    namespaces, gone = Namespaces(lab.paths.netns, lab.home), new_container_id()
    netns = await namespaces.create(gone, {})
    for interface in ("eth0", "eth1"):  # the node knows of the later one alone
        await executor.data_plane.gateway.connect(gone, netns, interface, ())
    bare = new_container_id()
    await namespaces.create(bare, {})
    assert held(lab, executor) == before | {gone, bare}
    assert set(await executor.engine.sweep()) == {gone, bare}
    assert held(lab, executor) == before
    assert await executor.engine.sweep() == []


@pytest.mark.parametrize("turns", [50, 200, 800])
async def test_the_removal_of_a_starting_container_disturbs_no_other(
    lab: Lab, executor: OciExecutor, turns: int
) -> None:
    """What watches it must not meet a record that is gone: in the same group, that ended all containers' keeping."""
    neighbor = executor.controller(a_task("sleep", "60", slot=1))
    await neighbor.prepare()
    await neighbor.start()
    task = a_task("sleep", "60")
    controller = executor.controller(task)
    await controller.prepare()
    starting = asyncio.create_task(controller.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    await executor.discard(task.task.id)
    await asyncio.wait([starting])
    starting.exception()
    await eventually(lambda: len(executor.engine.list()) == 1, "the other one is left")
    assert neighbor.observed() is not None
    await neighbor.terminate()
    await neighbor.wait()
