"""A directory that GlusterFS replicates, mounted by FUSE on two nodes, is a bind mount of tasks on both."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skep.agent.executor.oci import OciExecutor
from skep.model.container import Mount
from skep.playground.images.debian import unpack_with_libraries
from tests.integration.node.conftest import eventually
from tests.integration.node.test_oci_tasks import a_task, output
from tests.support.engine.runc_lab import Lab
from tests.support.storage.gluster import BRICKS, Gluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PACKAGES = ("glusterfs-server", "glusterfs-client", "glusterfs-common")


@pytest.fixture
async def other(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OciExecutor]:
    """A second node."""
    async with Lab(tmp_path_factory.mktemp("two")).running() as lab, (executor := lab.executor()).running():
        yield executor


async def test_tasks_of_two_nodes_share_it_and_outlive_the_loss_of_a_brick(
    tmp_path: Path, executor: OciExecutor, other: OciExecutor
) -> None:
    (tmp_path / "packages").mkdir()
    await unpack_with_libraries(tmp_path / "packages", *PACKAGES)
    gluster = Gluster(tmp_path, tmp_path / "packages" / "root")
    until_two = "until cat /data/two 2>/dev/null; do sleep 0.1; done"
    first = (
        f"echo of one >/data/one; {until_two}; echo after the loss >/data/three; grep ' /data ' /proc/mounts"
    )
    second = "until cat /data/one 2>/dev/null; do sleep 0.1; done; echo of two >/data/two"
    with gluster.running(), gluster.mounted("node1") as one, gluster.mounted("node2") as two:
        places = [Mount(type="bind", source=str(place), target="/data") for place in (one, two)]
        async with asyncio.TaskGroup() as group:
            task = a_task("sh", "-ec", first, slot=1, mounts=(places[0],))
            writing = group.create_task(output(executor, task))
            both = [gluster.files(number) / "one" for number in BRICKS]
            await eventually(lambda: all(file.exists() for file in both), "both bricks have the file", 60)
            gluster.kill(1)
            said = await output(other, a_task("sh", "-ec", second, slot=2, mounts=(places[1],)))
        assert said == "of one\n"
        assert writing.result().startswith("of two\n")
        assert " fuse.glusterfs " in writing.result()
        assert (two / "three").read_text() == "after the loss\n"
        assert (gluster.files(2) / "three").read_text() == "after the loss\n"
        assert not (gluster.files(1) / "three").exists()
