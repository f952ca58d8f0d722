"""SELinux keeps containers apart, on a kernel that enforces a policy (``SELINUX=1 make virtual`` boots one)."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skep.agent.executor.oci import OciExecutor
from skep.engine.api.responses.container_responses import inspected
from skep.engine.confinement import selinux
from skep.engine.containers.container import Container, ExecConfig, LogFilter
from skep.engine.containers.request import read_create
from skep.engine.engine import Engine
from skep.model.assignment import ConfigFile, SecretFile
from skep.model.container import (
    ConfigReference,
    FileTarget,
    Mount,
    Privileges,
    SecretReference,
    SELinuxContext,
)
from skep.model.values.ids import ConfigId, SecretId
from tests.integration.node.test_oci_tasks import a_task, output
from tests.support.engine.runc_lab import IMAGE

_ENFORCE = Path("/sys/fs/selinux/enforce")
enforcing = pytest.mark.skipif(
    not _ENFORCE.exists() or _ENFORCE.read_text() != "1",
    reason="this kernel enforces no SELinux policy: docs/untested.md",
)
DENIED = "Permission denied"


async def started(engine: Engine, *command: str, **host: Any) -> Container:
    """A container that the Engine API's request creates, running."""
    body = {"Image": IMAGE, "Cmd": list(command), "HostConfig": {"NetworkMode": "none", **host}}
    container = await engine.create(read_create(msgspec.json.encode(body)))
    return await engine.start(container.id)


async def printed(engine: Engine, *command: str, **host: Any) -> str:
    """What a container that ends by itself prints."""
    container = await started(engine, *command, **host)
    await engine.wait(container.id)
    text = "".join([entry.data.decode() async for entry in engine.logs(container.id, LogFilter())])
    await engine.remove(container.id, with_volumes=True)
    return text


async def executed(engine: Engine, container: Container, command: str) -> str:
    """What a command in a running container prints."""
    script = ("sh", "-c", f"{command} >/tmp/out 2>&1; true")
    exec_id = engine.execs.create(container.id, ExecConfig(command=script))
    (await engine.execs.start(exec_id)).close()
    await engine.execs.wait(exec_id)
    return (engine.bundles.rootfs(container.id) / "tmp/out").read_text()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of the machine with a file."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_text("found\n")
    return tmp_path / "source"


def label_of(path: Path) -> str:
    return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()


@enforcing
async def test_a_file_of_the_machine_is_not_readable_before_it_is_labeled(
    engine: Engine, source: Path
) -> None:
    binds = [f"{source}:/x"]
    assert DENIED in await printed(engine, "cat", "/x/file", Binds=binds)
    unconfined = await printed(engine, "cat", "/x/file", Binds=binds, SecurityOpt=["label=disable"])
    assert unconfined == "found\n"
    assert await printed(engine, "cat", "/x/file", Binds=binds, Privileged=True) == "found\n"
    assert DENIED in await printed(engine, "cat", "/x/file", Binds=binds), "nothing has labeled it"


@enforcing
async def test_shared_files_are_readable_by_all_and_private_ones_by_their_container(
    engine: Engine, source: Path
) -> None:
    shared, private = [f"{source}:/x:z"], [f"{source}:/x:Z"]
    first = await started(engine, "sleep", "1000", Binds=shared)
    assert await printed(engine, "cat", "/x/file", Binds=shared) == "found\n"
    assert await executed(engine, first, "cat /x/file") == "found\n"
    assert label_of(source / "file").endswith(":container_file_t:s0")
    second = await started(engine, "sleep", "1000", Binds=private)
    assert await executed(engine, second, "cat /x/file") == "found\n"
    assert DENIED in await executed(engine, first, "cat /x/file")
    assert DENIED in await printed(engine, "cat", "/x/file", Binds=[f"{source}:/x"])
    for container in (first, second):
        await engine.remove(container.id, force=True)


@enforcing
async def test_a_volume_is_shared_unless_its_mount_is_private(engine: Engine) -> None:
    writer = await started(engine, "sh", "-c", "echo found >/v/file; sleep 1000", Binds=["data:/v"])
    assert await executed(engine, writer, "cat /v/file") == "found\n"
    assert await printed(engine, "cat", "/v/file", Binds=["data:/v:ro"]) == "found\n"
    owner = await started(engine, "sleep", "1000", Binds=["data:/v:Z"])
    assert await executed(engine, owner, "cat /v/file") == "found\n"
    assert DENIED in await executed(engine, writer, "cat /v/file")
    for container in (writer, owner):
        await engine.remove(container.id, force=True)


@enforcing
async def test_inspect_shows_the_labels_that_processes_have(engine: Engine, executor: OciExecutor) -> None:
    containers = [await started(engine, "sleep", "1000") for _ in range(2)]
    shown = [inspected(one, executor.engine.bundles, (), {}) for one in containers]
    for container, response in zip(containers, shown, strict=True):
        process = response["ProcessLabel"]
        assert process.startswith("system_u:system_r:container_t:s0:c")
        assert response["MountLabel"] == process.replace("system_r:container_t", "object_r:container_file_t")
        assert Path(f"/proc/{container.pid}/attr/current").read_text().rstrip("\0\n") == process
        assert (await executed(engine, container, "cat /proc/self/attr/current")).rstrip("\0\n") == process
        assert label_of(engine.bundles.rootfs(container.id) / "bin/busybox") == response["MountLabel"]
    assert shown[0]["ProcessLabel"] != shown[1]["ProcessLabel"]
    for container in containers:
        await engine.remove(container.id, force=True)


@enforcing
async def test_a_container_uses_the_files_that_every_container_has(engine: Engine) -> None:
    command = (
        "cat /etc/hosts /etc/hostname /etc/resolv.conf >/dev/null && echo a >/etc/hosts && "
        "echo b >/dev/shm/b && echo c >/t/c && echo d >/tmp/d && cat /etc/hosts /dev/shm/b /t/c /tmp/d"
    )
    host = {"Tmpfs": {"/t": ""}}
    assert await printed(engine, "sh", "-c", command, **host) == "a\nb\nc\nd\n"
    assert await printed(engine, "sh", "-c", command, **host, IpcMode="shareable") == "a\nb\nc\nd\n"
    assert await printed(engine, "echo", "under an init", Init=True) == "under an init\n"
    mount = {"Type": "image", "Source": IMAGE, "Target": "/i"}
    assert "root" in await printed(engine, "cat", "/i/etc/passwd", Mounts=[mount])


@enforcing
async def test_a_container_that_joins_another_has_its_label(engine: Engine) -> None:
    first = await started(engine, "sleep", "1000", IpcMode="shareable")
    joined = await started(engine, "sleep", "1000", IpcMode=f"container:{first.name}")
    assert joined.config.process_label == first.config.process_label
    on_host = await printed(engine, "cat", "/proc/self/attr/current", PidMode="host")
    assert "container_t" not in on_host
    for container in (joined, first):
        await engine.remove(container.id, force=True)


@enforcing
async def test_a_task_reads_its_secrets_which_have_its_label(executor: OciExecutor) -> None:
    executor.payloads.put([SecretFile(id=SecretId("s1"), data=b"hidden\n")], [])
    reference = SecretReference(
        secret_id=SecretId("s1"), secret_name="s", file=FileTarget(name="s", mode=0o444)
    )
    assert await output(executor, a_task("cat", "/run/secrets/s", secrets=(reference,))) == "hidden\n"
    task = a_task("sleep", "1000", secrets=(reference,))
    controller = executor.controller(task)
    await controller.prepare()
    await controller.start()
    container = executor.engine.get(task.name)
    (path,) = [point.source for point in container.config.mounts if point.internal]
    assert label_of(Path(path)) == container.config.mount_label
    await executor.engine.remove(container.id, force=True)


@enforcing
async def test_a_task_reads_its_configs(executor: OciExecutor) -> None:
    executor.payloads.put([], [ConfigFile(id=ConfigId("c1"), name="c", data=b"shown\n")])
    reference = ConfigReference(
        config_id=ConfigId("c1"), config_name="c", file=FileTarget(name="/c", mode=0o444)
    )
    assert await output(executor, a_task("cat", "/c", configs=(reference,))) == "shown\n"


@enforcing
async def test_labels_of_a_service_choose_who_reads_what_its_tasks_mount(
    executor: OciExecutor, source: Path
) -> None:
    """A stack's ``z`` and ``Z`` become the label ``skep.relabel``, because SwarmKit's messages have no such field."""
    directory = Mount(type="bind", source=str(source), target="/x")
    volume = Mount(type="volume", source="numbers", target="/v")

    async def read(relabel: str = "") -> str:
        labels = {"skep.relabel": relabel} if relabel else {}
        task = a_task("cat", "/x/file", "/v/file", mounts=(directory, volume), labels=labels)
        return await output(executor, task)

    await output(executor, a_task("sh", "-c", "echo kept >/v/file", mounts=(volume,)))
    assert DENIED in await read(), "the directory has the machine's labels"
    assert await read("/x=z") == "found\nkept\n"
    assert await read() == "found\nkept\n", "every task may read it from now on"
    assert await read("/x=Z,/v=Z") == "found\nkept\n"
    assert (await read()).count(DENIED) == 1, "the volume is shared again, the directory stays another task's"


@enforcing
async def test_options_of_a_service_change_the_labels_of_its_tasks(
    executor: OciExecutor, source: Path
) -> None:
    directory = Mount(type="bind", source=str(source), target="/x")

    async def run(*command: str, relabel: str = "", **options: Any) -> str:
        labels = {"skep.relabel": f"/x={relabel}"} if relabel else {}
        privileges = Privileges(selinux_context=SELinuxContext(**options)) if options else None
        task = a_task(*command, mounts=(directory,), labels=labels, privileges=privileges)
        return await output(executor, task)

    assert await run("cat", "/x/file", disable=True) == "found\n"
    assert "container_t" not in await run("cat", "/proc/self/attr/current", disable=True)
    level = {"level": "s0:c7,c8"}
    shown = await run("cat", "/proc/self/attr/current", **level)
    assert shown.rstrip("\0\n") == "system_u:system_r:container_t:s0:c7,c8"
    assert await run("cat", "/x/file", relabel="Z", **level) == "found\n"
    assert await run("cat", "/x/file", **level) == "found\n", "tasks of one level share their files"
    assert DENIED in await run("cat", "/x/file", level="s0:c7,c9")
    assert DENIED in await run("cat", "/x/file")


@pytest.mark.skipif(selinux.is_active(), reason="this kernel has SELinux")
async def test_without_selinux_options_are_ignored_as_in_docker(engine: Engine, source: Path) -> None:
    options = ["label=type:some_t", "label=anything"]
    container = await started(engine, "cat", "/x/file", Binds=[f"{source}:/x:Z"], SecurityOpt=options)
    await engine.wait(container.id)
    text = "".join([entry.data.decode() async for entry in engine.logs(container.id, LogFilter())])
    shown = inspected(container, engine.bundles, (), {})
    assert (text, shown["ProcessLabel"], shown["MountLabel"]) == ("found\n", "", "")
    assert shown["HostConfig"]["SecurityOpt"] == options
    with pytest.raises(OSError, match="No data available"):
        label_of(source / "file")
