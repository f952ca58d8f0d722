"""Plain processes (``skep.executor=process``): programs of the machine, and what they see of it."""

import io
import re
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from skep.agent.executor.adapter import NodeFacts
from skep.agent.executor.interface import Rejected
from skep.agent.executor.oci import OciController, OciExecutor
from skep.engine.containers.commits import CommitRequest, commit
from skep.engine.containers.container import ExecConfig
from skep.engine.images.image import ContainerDefaults
from skep.engine.volumes.files import ArchiveTarget
from skep.errors import FailedPrecondition, InvalidArgument, NotFound, SkepError
from skep.model.assignment import ConfigFile, SecretFile
from skep.model.container import (
    BindOptions,
    ConfigReference,
    FileTarget,
    Mount,
    SecretReference,
    TmpfsOptions,
    Ulimit,
)
from skep.model.permissions.rights import Right
from skep.model.service import Limits, ResourceRequirements
from skep.model.task import AssignedTask
from skep.model.values.ids import ConfigId, SecretId
from skep.model.values.times import ZERO_TIME
from tests.integration.node.test_oci_tasks import a_task, output
from tests.support.engine.api_lab import Api
from tests.support.engine.runc_lab import Lab

LABELS = {"skep.executor": "process"}


def a_process(*command: str, labels: dict[str, str] | None = None, **spec: object) -> AssignedTask:
    return a_task(*command, image="scratch:latest", labels=LABELS | (labels or {}), **spec)


def a_script(text: str, **spec: object) -> AssignedTask:
    return a_process("/bin/sh", "-c", text, **spec)


async def a_running_process(executor: OciExecutor, **spec: object) -> tuple[AssignedTask, OciController]:
    task = a_process("sleep", "600", **spec)
    controller = executor.controller(task)
    await controller.prepare()
    await controller.start()
    return task, controller


async def test_a_program_of_the_machine_runs_as_nobody(executor: OciExecutor) -> None:
    script = "import os; print(os.getuid(), os.getgid(), os.getgroups(), os.getpid(), os.getcwd())"
    assert await output(executor, a_process("python3", "-c", script)) == "65534 65534 [65534] 1 /\n"


async def test_a_process_is_a_container_without_an_image(lab: Lab, executor: OciExecutor) -> None:
    task, controller = await a_running_process(executor)
    container = executor.engine.get(task.name)
    assert (container.image, container.image_id, lab.images.pulls) == ("scratch:latest", "", 0)
    assert executor.engine.changes(container.id) == [], "mount points are no changes of the user"
    assert [one[-1] for one in (await executor.engine.top(container.id)).processes] == ["sleep 600"]
    await controller.shutdown()
    await controller.remove()
    assert lab.remains() == []


async def test_only_directories_of_programs_are_visible(executor: OciExecutor) -> None:
    places = ("/run", "/home", "/root", "/srv", "/mnt", "/var/lib", "/var/log", "/var/run/", "/tmp")
    text = await output(executor, a_script(f"ls -A {' '.join(places)} /"))
    *found, own = text.strip().split("\n\n")
    assert found[0].startswith("/:"), text
    assert {own, *found[1:]} == {f"{place}:" for place in places}, "all are empty"


async def test_files_of_root_stay_closed(executor: OciExecutor) -> None:
    closed = [
        str(path)
        for path in Path("/etc").rglob("*")
        if path.is_file() and not path.is_symlink() and not path.stat().st_mode & 0o004
    ]
    assert "/etc/shadow" in closed
    script = f"for at in {' '.join(closed)}; do cat $at; done 2>/dev/null | wc -c"
    assert await output(executor, a_script(script)) == "0\n"


async def test_the_machines_files_cannot_be_changed(executor: OciExecutor) -> None:
    script = (
        "for at in /usr /etc /opt /bin /; do touch $at/x; done; touch /tmp/x /var/tmp/x /dev/shm/x && echo ok"
    )
    text = await output(executor, a_script(f"exec 2>&1; {script}", user="1:1"))
    assert text.count("Read-only file system") == 4, text
    assert text.count("Permission denied") == 1, "its own root directory belongs to root"
    assert text.endswith("ok\n")


async def test_set_user_id_programs_have_no_effect(executor: OciExecutor) -> None:
    script = "grep -E 'NoNewPrivs|Cap(Eff|Prm|Amb)' /proc/self/status; grep ' /usr ' /proc/self/mountinfo"
    *status, mount = (await output(executor, a_script(script))).splitlines()
    assert {line.split("\t")[1].strip("0") for line in status[:-1]} == {""}, status
    assert status[-1] == "NoNewPrivs:\t1"
    assert {"ro", "nosuid", "nodev"} <= set(mount.split()[5].split(","))


@pytest.mark.parametrize("user", ["root", "0", "12345", "12345:0", "nobody:root"])
async def test_root_and_its_group_are_refused(executor: OciExecutor, user: str) -> None:
    with pytest.raises(SkepError, match=r"root"):
        await output(executor, a_script("id", user=user))


async def test_a_hidden_file_is_closed_to_its_group(executor: OciExecutor) -> None:
    text = await output(executor, a_script("cat /etc/shadow | wc -c", user="nobody", groups=("shadow",)))
    assert text == "0\n"


async def test_limits_are_applied_as_to_a_container(executor: OciExecutor) -> None:
    limits = Limits(memory_bytes=32 << 20, nano_cpus=250_000_000, pids=33)
    task, controller = await a_running_process(
        executor,
        resources=ResourceRequirements(limits=limits),
        ulimits=(Ulimit(name="nofile", soft=1234, hard=2345),),
    )
    container = executor.engine.get(task.name)
    stats = await executor.engine.stats(container.id)
    assert (stats.memory_stats.limit, stats.pids_stats.limit) == (32 << 20, 33)
    written = executor.engine.bundles.specification(container.id)
    assert msgspec.json.decode(written.read_bytes())["linux"]["resources"]["cpu"]["quota"] == 25_000
    files = Path(f"/proc/{container.pid}/limits").read_text()
    assert re.search(r"Max open files +1234 +2345 ", files), files
    await controller.terminate()


async def test_the_environment_is_a_containers(executor: OciExecutor) -> None:
    task = a_script("echo $HOME-$A-$HOSTNAME; cat /etc/hostname", env=("A=1",), hostname="h1")
    assert await output(executor, task) == "/nonexistent-1-h1\nh1\n"


async def test_an_init_reaps_the_children_of_a_process(executor: OciExecutor) -> None:
    text = await output(executor, a_script("cat /proc/1/cmdline | tr '\\0' ' '", init=True))
    assert text.startswith("/run/docker-init -- /bin/sh -c cat ")


async def test_a_directory_of_the_machine_is_mounted_on_request(
    executor: OciExecutor, tmp_path: Path
) -> None:
    data = tmp_path / "shared"
    data.mkdir()
    data.chmod(0o777)
    mounts = (
        Mount(type="bind", source=str(data), target="/srv/data"),
        Mount(type="bind", source=str(data), target="/opt"),
        Mount(type="tmpfs", target="/run", tmpfs_options=TmpfsOptions(mode=0o1777)),
    )
    text = await output(
        executor, a_script("echo 1 >/srv/data/a && cat /opt/a && touch /run/x && echo ok", mounts=mounts)
    )
    assert text == "1\nok\n"
    assert (data / "a").stat().st_uid == 65534


async def test_a_new_volume_belongs_to_the_user_of_the_process(executor: OciExecutor) -> None:
    mounts = (
        Mount(type="volume", source="data", target="/var/lib/data"),
        Mount(type="volume", source="more", target="/data/a/b"),
    )
    script = "echo 1 >/var/lib/data/a; echo 2 >/data/a/b/c; stat -c '%U %a' /var/lib/data /data /data/a/b"
    for _ in range(2):  # the second task finds the data of the first one
        task = a_script(script, mounts=mounts, user="www-data")
        assert await output(executor, task) == "www-data 755\nroot 755\nwww-data 755\n"


async def test_a_target_that_the_machine_lacks_is_refused_by_name(
    executor: OciExecutor, tmp_path: Path
) -> None:
    mount = Mount(type="bind", source=str(tmp_path), target="/etc/nosuch/x", bind_options=BindOptions())
    with pytest.raises(SkepError, match=r"the mount target /etc/nosuch/x does not exist on this machine"):
        await executor.controller(a_script("true", mounts=(mount,))).prepare()


async def test_a_command_in_a_process_is_unprivileged(executor: OciExecutor) -> None:
    task, controller = await a_running_process(executor)
    execs = executor.engine.execs
    for config in (ExecConfig(command=("id",), user="root"), ExecConfig(command=("id",), privileged=True)):
        id = execs.create(task.name, config)
        with pytest.raises(InvalidArgument, match="a plain process"):
            await execs.start(id)
    await controller.terminate()


async def test_copies_do_not_reach_the_machines_files(executor: OciExecutor) -> None:
    task, controller = await a_running_process(executor)
    files = executor.engine.files
    for path in ("/etc/shadow", "/etc/passwd", "/usr/bin/id", "/bin/id"):
        with pytest.raises(NotFound):
            await files.status(task.name, path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())

    async def content() -> AsyncIterator[bytes]:
        yield packed.getvalue()

    with pytest.raises(SkepError, match="read-only"):
        await files.write(task.name, ArchiveTarget(path="/etc"), content())
    await files.write(task.name, ArchiveTarget(path="/tmp"), content())
    assert (await files.status(task.name, "/tmp/x")).name == "x"
    await controller.terminate()


async def test_a_node_that_does_not_allow_processes_rejects_them(executor: OciExecutor) -> None:
    executor.node = NodeFacts(hostname="n", allowed=frozenset(Right) - {Right.PROCESSES})
    with pytest.raises(Rejected, match="refuses its tasks: processes"):
        await executor.controller(a_script("true")).prepare()


async def test_what_a_manager_should_have_refused_is_rejected(executor: OciExecutor) -> None:
    for spec in ({"capability_add": ("CAP_SYS_ADMIN",)}, {"labels": {"skep.privileged": "true"}}):
        with pytest.raises(Rejected, match="does not work with"):
            await executor.controller(a_script("true", **spec)).prepare()
    task = a_script("true")
    spec = replace(task.task.spec, container_spec=replace(task.task.spec.container_spec, image="busybox"))
    with pytest.raises(Rejected, match="use the image scratch"):
        await executor.controller(replace(task, task=replace(task.task, spec=spec))).prepare()


async def test_secrets_and_configs_reach_a_process(executor: OciExecutor) -> None:
    executor.payloads.put(
        [SecretFile(id=SecretId("s1"), name="password", data=b"hush")],
        [ConfigFile(id=ConfigId("c1"), name="site", data=b"conf")],
    )
    task = a_script(
        "cat /run/secrets/password /etc/passwd",
        secrets=(
            SecretReference(
                secret_id=SecretId("s1"),
                secret_name="password",
                file=FileTarget(name="password", uid="65534", gid="65534", mode=0o400),
            ),
        ),
        configs=(
            ConfigReference(
                config_id=ConfigId("c1"),
                config_name="site",
                file=FileTarget(name="/etc/passwd", uid="0", gid="0", mode=0o444),
            ),
        ),
    )
    assert await output(executor, task) == "hushconf\n"


async def test_docker_shows_a_process_like_a_container(api: Api, executor: OciExecutor) -> None:
    task, controller = await a_running_process(executor)
    _, [line] = await api.ask("GET", "/containers/json?size=1")
    assert (line["Image"], line["ImageID"], line["Command"]) == ("scratch:latest", "", "sleep 600")
    _, shown = await api.ask("GET", f"/containers/{task.name}/json?size=1")
    assert (shown["Config"]["Image"], shown["Config"]["User"]) == ("scratch:latest", "65534:65534")
    assert shown["Mounts"] == []
    assert (await api.ask("GET", "/system/df"))[0] == 200
    assert (await api.ask("GET", '/containers/json?filters={"ancestor":["scratch"]}'))[1] == []
    _, output, _ = await api.docker("exec", task.name, "cat", "/proc/1/comm")
    assert output == "sleep\n"
    await controller.terminate()


async def test_no_registry_is_asked_for_the_empty_image(api: Api) -> None:
    status, described = await api.ask("GET", "/distribution/scratch:latest/json")
    assert status == 200
    assert described["Descriptor"]["digest"].startswith("sha256:e3b0c44298fc")


async def test_a_process_is_no_image(executor: OciExecutor) -> None:
    task = a_process("true")
    await executor.controller(task).prepare()
    with pytest.raises(FailedPrecondition, match="without an image"):
        await commit(executor.engine, task.name, CommitRequest(), ContainerDefaults(), ZERO_TIME)
