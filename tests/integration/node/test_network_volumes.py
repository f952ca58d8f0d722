"""Volumes of the driver ``local`` on NFS and CIFS, before the servers of Debian, in the machine of ``make virtual``."""

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest

from skep.agent.executor.interface import Controller
from skep.agent.executor.oci import OciExecutor
from skep.engine.containers.container import MountPoint
from skep.engine.runtime import mapped_mounts
from skep.errors import SkepError
from skep.linux.mounting import mount_targets
from skep.linux.user_namespaces import mapping_problem
from skep.model.container import Mount
from skep.model.values.user_map import IdRange, UserMap
from tests.integration.node.conftest import eventually
from tests.integration.node.test_oci_tasks import a_task, output
from tests.integration.node.test_volumes import with_options
from tests.support.engine.runc_lab import Lab
from tests.support.storage.file_servers import PASSWORD, SMB_PORT, Share, nfs_server, nfs_threads, samba
from tests.unit.engine.test_mapped_users import a_container

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.environ.get("SKEP_VIRTUAL") != "1",
        reason="it starts file servers of the machine, as make virtual has one for: docs/untested.md",
    ),
]

FIRST = 700_000
USERS = UserMap(uids=(IdRange(0, FIRST, 65536),), gids=(IdRange(0, FIRST, 65536),))


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Share]]:
    root = tmp_path_factory.mktemp("servers")
    with nfs_server(root / "nfs") as found, samba(root / "cifs", root / "samba") as cifs:
        yield {**found, "cifs": cifs}


@pytest.fixture
async def other(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OciExecutor]:
    """A second node."""
    async with Lab(tmp_path_factory.mktemp("two")).running() as lab, (executor := lab.executor()).running():
        yield executor


@pytest.mark.parametrize("kind", ["nfs 3", "nfs 4", "cifs"])
async def test_tasks_of_two_nodes_write_and_read_one_volume(
    kind: str, shares: Mapping[str, Share], executor: OciExecutor, other: OciExecutor
) -> None:
    share = shares[kind]
    mount = with_options("files", dict(share.options))
    first = "echo of one >/data/one; while ! cat /data/two; do sleep 0.2; done 2>/dev/null; mount | grep ' /data '"
    second = "while ! cat /data/one; do sleep 0.2; done 2>/dev/null; echo of two >/data/two"
    said = await asyncio.gather(
        output(executor, a_task("sh", "-c", first, slot=1, mounts=(mount,))),
        output(other, a_task("sh", "-c", second, slot=2, mounts=(mount,))),
    )
    assert said[0].startswith("of two\n")
    assert f" type {share.shown} (" in said[0]
    assert said[1] == "of one\n"
    assert (share.directory / "one").read_text() == "of one\n"
    for node in (executor, other):
        path = str(node.engine.volumes.path("files"))
        await eventually(lambda path=path: path not in mount_targets(), "the volume is unmounted", 60)  # type: ignore[misc]
    for file in share.directory.iterdir():
        file.unlink()


async def failure(executor: OciExecutor, mount: Mount) -> str:
    """Why a task with that mount does not start."""
    controller = executor.controller(a_task("true", mounts=(mount,)))
    await controller.prepare()
    with pytest.raises(SkepError) as failed:
        await controller.start()
    await controller.remove()
    assert str(executor.engine.volumes.path(mount.source)) not in mount_targets()
    return str(failed.value)


async def test_a_server_that_is_away_or_refuses_fails_the_task_with_the_kernels_reason(
    shares: Mapping[str, Share], executor: OciExecutor
) -> None:
    nfs, cifs = shares["nfs 4"], shares["cifs"]
    away = with_options("away", nfs.with_option("nfsvers=4", "nfsvers=4,port=1"))
    path = executor.engine.volumes.path("away")
    assert (
        f"error while mounting volume '{path}': failed to mount local volume: mount :/:{path}, "
        "data: addr=127.0.0.1,nfsvers=4,port=1,timeo=20,retrans=1: connection refused"
    ) in await failure(executor, away)
    no_share = with_options("noshare", {**shares["nfs 3"].options, "device": ":/no/such"})
    said = await failure(executor, no_share)
    assert said.endswith((": permission denied", ": no such file or directory")), said
    closed = with_options("closed", cifs.with_option(f"port={SMB_PORT}", "port=1"))
    assert (await failure(executor, closed)).endswith(": connection refused")
    login = with_options("login", cifs.with_option(PASSWORD, "wrong-horse"))
    said = await failure(executor, login)
    assert said.endswith(": permission denied"), said
    assert "password=********" in said
    assert "wrong-horse" not in said


async def test_a_server_that_is_silent_fails_its_own_task_alone(
    shares: Mapping[str, Share], executor: OciExecutor
) -> None:
    executor.engine.volumes.mount_deadline_s = 10.0
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        # Without its short limits: the kernel would give up before the node does.
        nfs = shares["nfs 4"].with_option(",timeo=20,retrans=1", f",port={port}")
        cifs = shares["cifs"].with_option(f"port={SMB_PORT}", f"port={port}")
        async with asyncio.TaskGroup() as group:
            waiting = [
                group.create_task(failure(executor, with_options(name, options)))
                for name, options in (("silent-nfs", nfs), ("silent-cifs", cifs))
            ]
            assert await output(executor, a_task("echo", "hello", slot=9)) == "hello\n"
        for one in waiting:
            assert "it takes longer than 10 s" in one.result()


async def ends(controller: Controller, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await controller.wait()
    except TimeoutError:
        return False
    return True


async def test_a_server_that_goes_away_under_a_task_holds_up_nothing_else(
    shares: Mapping[str, Share], executor: OciExecutor
) -> None:
    share, volumes = shares["nfs 4"], executor.engine.volumes
    volumes.mount_deadline_s = 60.0
    writing = "while echo again >>/data/file; do sleep 0.1; done"
    task = a_task(
        "sh", "-c", writing, mounts=(with_options("files", dict(share.options)),), stop_grace_period=0
    )
    controller = executor.controller(task)
    await controller.prepare()
    await controller.start()
    await eventually((share.directory / "file").exists, "the task has written", 60)
    path = str(volumes.path("files"))
    nfs_threads(0)
    try:
        assert await output(executor, a_task("echo", "hello", slot=9)) == "hello\n"
        assert "files" in volumes.names()
        await controller.terminate()
        has_ended = await ends(controller, within_s=60)
        if has_ended:
            await eventually(lambda: path not in mount_targets(), "the volume is unmounted", 120)
    finally:
        nfs_threads(4)
    # SIGKILL does not end a process in the middle of each write to a hard mount: it waits for its server, which takes
    # nothing new for 90 s after its start (lease time).
    assert has_ended or await ends(controller, within_s=240)
    await eventually(lambda: path not in mount_targets(), "the volume is unmounted", 120)
    await controller.remove()
    text = await output(
        executor, a_task("cat", "/data/file", mounts=(with_options("files", dict(share.options)),))
    )
    assert text.startswith("again\n")


@pytest.fixture
async def mapped() -> AsyncIterator[OciExecutor]:
    """A node with userns-remap, whose directories other users can pass."""
    with tempfile.TemporaryDirectory(prefix="skep-users-", dir="/var/tmp") as name:
        Path(name).chmod(0o711)
        async with Lab(Path(name) / "node", USERS).running() as lab, (executor := lab.executor()).running():
            yield executor


@pytest.mark.parametrize("kind", ["nfs 3", "nfs 4"])
async def test_a_volume_has_the_servers_owners_on_a_node_with_mapped_users(
    kind: str, shares: Mapping[str, Share], mapped: OciExecutor
) -> None:
    share = shares[kind]
    roots, given = share.directory / "roots", share.directory / "given"
    roots.write_text("of the machine's root")
    roots.chmod(0o600)
    given.mkdir()
    os.chown(given, FIRST, FIRST)
    command = (
        "exec 2>&1; id -u; stat -c %u /data/roots /data/given; cat /data/roots; touch /data/new;"
        " echo mine >/data/given/file; stat -c %u /data/given/file; cat /data/given/file"
    )
    try:
        mount = with_options("files", dict(share.options))
        said = await output(mapped, a_task("sh", "-c", command, mounts=(mount,)))
        assert said.splitlines() == [
            "0",
            "65534",
            "0",
            "cat: can't open '/data/roots': Permission denied",
            "touch: /data/new: Permission denied",
            "0",
            "mine",
        ]
        assert ((given / "file").stat().st_uid, (given / "file").stat().st_gid) == (FIRST, FIRST)
        path = str(mapped.engine.volumes.path("files"))
        await eventually(lambda: path not in mount_targets(), "the volume is unmounted", 60)
    finally:
        roots.unlink()
        shutil.rmtree(given, ignore_errors=True)


def test_a_cluster_volume_on_nfs_has_the_servers_owners_and_a_node_keeps_no_containers_there(
    shares: Mapping[str, Share], tmp_path: Path
) -> None:
    """No kernel has id-mapped mounts of NFS.  One that has them would need another page in the guide."""
    volumes, views = tmp_path / "volumes", tmp_path / "views"
    volume = volumes / "one" / "mount"
    volume.mkdir(parents=True)
    (shares["nfs 4"].directory / "file").touch()
    subprocess.run(
        ["mount", "-t", "nfs4", "-o", "timeo=20,retrans=1", "127.0.0.1:/", volume], check=True, timeout=60
    )
    try:
        point = MountPoint(type="bind", destination="/data", source=str(volume))
        mapped_mounts.mount_all(a_container(users=USERS, mounts=(point,)), [point], views, (volumes,))
        try:
            assert (views / "0" / "file").stat().st_uid == 0
        finally:
            mapped_mounts.unmount_all(views)
        assert mapping_problem(volume / "data") == "mount_setattr: Invalid argument"
    finally:
        subprocess.run(["umount", volume], check=True, timeout=60)
        subprocess.run(["rm", "-rf", *shares["nfs 4"].directory.iterdir()], check=True)
