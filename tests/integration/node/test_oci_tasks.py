"""Tasks as containers: what a service's task becomes on a node."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from skep.agent.executor.interface import Rejected
from skep.agent.executor.oci import OciExecutor
from skep.agent.executor.payloads import Payloads
from skep.agent.tasks.task_logs import TaskLogs
from skep.engine.containers.container import LogFilter
from skep.engine.images.image import ContainerDefaults
from skep.errors import SkepError
from skep.linux import syscalls
from skep.linux.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_REMOUNT
from skep.model.assignment import ConfigFile, SecretFile
from skep.model.container import (
    BindOptions,
    ConfigReference,
    ContainerSpec,
    FileTarget,
    Mount,
    SecretReference,
    TmpfsOptions,
    VolumeOptions,
)
from skep.model.logs import LogQuery, LogStream
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    Limits,
    NamedResource,
    PortConfig,
    PublishMode,
    ResourceRequirements,
    TaskSpec,
)
from skep.model.task import AssignedTask, Task
from skep.model.values.ids import ConfigId, NodeId, SecretId, ServiceId, TaskId, new_id
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from tests.support.engine.runc_lab import IMAGE, Lab, with_defaults


def a_task(*command: str, ports: tuple[PortConfig, ...] = (), slot: int = 2, **spec: object) -> AssignedTask:
    template = {name: spec.pop(name) for name in ("resources", "log_driver") if name in spec}
    container = ContainerSpec(**{"image": IMAGE, "command": command, **spec})  # type: ignore[arg-type]
    task = Task(
        id=TaskId(new_id()),
        slot=slot,
        node_id=NodeId("node1"),
        service_id=ServiceId("service1"),
        spec=TaskSpec(container_spec=container, **template),  # type: ignore[arg-type]
    )
    return AssignedTask(task=task, service_name="web", service_labels={"tier": "front"}, ports=ports)


async def output(executor: OciExecutor, task: AssignedTask) -> str:
    """What the task's container prints until it ends."""
    controller = executor.controller(task)
    await controller.prepare()
    await controller.start()
    await controller.wait()
    id = executor.engine.get(task.name).id
    text = "".join([entry.data.decode() async for entry in executor.engine.logs(id, LogFilter())])
    await controller.remove()
    return text


async def test_the_container_has_dockers_name_and_labels(executor: OciExecutor) -> None:
    task = a_task("true", labels={"mine": "1", "com.docker.swarm.task.id": "forged"})
    await executor.controller(task).prepare()
    container = executor.engine.get(f"web.2.{task.task.id}")
    assert container.labels == {
        "mine": "1",
        "com.docker.swarm.node.id": "node1",
        "com.docker.swarm.service.id": "service1",
        "com.docker.swarm.service.name": "web",
        "com.docker.swarm.task": "",
        "com.docker.swarm.task.id": task.task.id,
        "com.docker.swarm.task.name": f"web.2.{task.task.id}",
    }
    assert container.image == IMAGE


async def test_the_use_of_a_volume_is_kept_if_the_node_process_ended_right_after_the_creation(
    lab: Lab, executor: OciExecutor
) -> None:
    """Otherwise the next task of the slot would be placed on a node without its data."""
    made = a_task("true", mounts=(Mount(type="volume", source="data", target="/data"),))
    created = msgspec.structs.replace(made.task, created_at=Timestamp("2026-01-01T00:00:00Z"))
    task = msgspec.structs.replace(made, task=created)
    await executor.controller(task).prepare()
    uses = lab.paths.volumes / "data" / "uses.json"
    uses.unlink()
    later = lab.executor()
    async with later.running():
        assert later.engine.volumes.uses == {}
        await later.controller(task).prepare()
        assert set(later.engine.volumes.uses["data"]) == {"web.2"}
        assert uses.exists()


async def test_a_missing_image_is_rejected_with_dockers_words(executor: OciExecutor) -> None:
    with pytest.raises(Rejected, match=r"^No such image: nosuch:1: "):
        await executor.controller(a_task("true", image="nosuch:1")).prepare()
    assert await executor.leftovers() == []


async def test_an_unreachable_registry_is_contacted_once_for_many_tasks(
    lab: Lab, executor: OciExecutor
) -> None:
    await asyncio.gather(*(executor.controller(a_task("true")).prepare() for _ in range(5)))
    assert lab.images.pulls == 1


async def test_a_command_that_cannot_start_gives_the_exit_code_and_the_runtimes_words(
    executor: OciExecutor,
) -> None:
    controller = executor.controller(a_task("nosuch"))
    await controller.prepare()
    with pytest.raises(SkepError, match="starting container failed: OCI runtime create failed") as failed:
        await controller.start()
    assert "executable file not found" in str(failed.value)
    observed = controller.observed()
    assert observed is not None
    assert observed.container.exit_code == 127


async def test_the_images_defaults_are_used_where_the_task_has_none(lab: Lab, executor: OciExecutor) -> None:
    with_defaults(
        lab.images,
        ContainerDefaults(
            entrypoint=("sh", "-c"),
            cmd=('echo "$A $B $(pwd) $(id -u)"',),
            env=("A=1", "B=1"),
            working_dir="/tmp",
            user="alice",
        ),
    )
    assert await output(executor, a_task(env=("B=2",))) == "1 2 /tmp 1000\n"
    assert await output(executor, a_task(args=("echo other",))) == "other\n"
    assert await output(executor, a_task("echo", args=("whole",), user="0")) == "whole\n"


async def test_nothing_to_run_is_rejected(lab: Lab, executor: OciExecutor) -> None:
    with_defaults(lab.images, ContainerDefaults())
    with pytest.raises(Rejected, match="No command specified"):
        await executor.controller(a_task()).prepare()


async def test_placeholders_are_filled_in(executor: OciExecutor) -> None:
    task = a_task(
        *("sh", "-c", "hostname; echo $WHO"),
        hostname="{{.Service.Name}}-{{.Task.Slot}}",
        env=('WHO={{.Node.Hostname}} {{.Node.ID}} {{index .Service.Labels "tier"}}',),
    )
    assert await output(executor, task) == "web-2\nlab node1 front\n"
    with pytest.raises(Rejected, match="can't evaluate field Nonsense"):
        await executor.controller(a_task("true", hostname="{{.Nonsense}}")).prepare()


async def test_secrets_and_configs_are_files_with_their_owner_and_mode(
    lab: Lab, executor: OciExecutor
) -> None:
    executor.payloads.put(
        [SecretFile(id=SecretId("s1"), name="password", data=b"hush")],
        [ConfigFile(id=ConfigId("c1"), name="site", data=b"conf")],
    )
    task = a_task(
        *(
            "sh",
            "-c",
            "cat /run/secrets/pass /etc/key /etc/site; stat -c '%u:%g %a' /run/secrets/pass /etc/key /etc/site",
        ),
        secrets=(
            SecretReference(
                secret_id=SecretId("s1"),
                secret_name="password",
                file=FileTarget(name="pass", uid="1000", gid="50", mode=0o400),
            ),
            SecretReference(
                secret_id=SecretId("s1"),
                secret_name="password",
                file=FileTarget(name="/etc/key", uid="7", gid="8", mode=0o440),
            ),
        ),
        configs=(
            ConfigReference(
                config_id=ConfigId("c1"),
                config_name="site",
                file=FileTarget(name="/etc/site", uid="0", gid="0", mode=0o444),
            ),
        ),
    )
    assert await output(executor, task) == "hushhushconf1000:50 400\n7:8 440\n0:0 444\n"
    on_disk = [path for path in lab.paths.data.rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    assert on_disk == []
    assert list((lab.paths.secrets / "files").iterdir()) == []


@pytest.mark.parametrize("is_upgraded", [False, True], ids=["new", "upgraded"])
async def test_scripts_of_configs_and_secrets_are_programs(
    lab: Lab, executor: OciExecutor, is_upgraded: bool
) -> None:
    """As in Docker 20.10.  Set-user-ID bits and devices have no effect."""
    if is_upgraded:
        flags = MS_REMOUNT | MS_BIND | MS_NOEXEC | MS_NOSUID | MS_NODEV
        syscalls.mount("", lab.paths.secrets, None, flags)
        executor.payloads.open()
    script = b"#!/bin/sh\necho started; grep ' /start.sh ' /proc/mounts\n"
    executor.payloads.put(
        [SecretFile(id=SecretId("s1"), data=b"#!/bin/sh\nexec /start.sh\n")],
        [ConfigFile(id=ConfigId("c1"), data=script)],
    )
    task = a_task(
        "/run/secrets/entry",
        secrets=(SecretReference(secret_id=SecretId("s1"), file=FileTarget(name="entry", mode=0o500)),),
        configs=(ConfigReference(config_id=ConfigId("c1"), file=FileTarget(name="/start.sh", mode=0o555)),),
    )
    text = await output(executor, task)
    assert text.startswith("started\n")
    assert {"ro", "nosuid", "nodev"} <= set(text.split()[4].split(","))


async def test_assigned_generic_resources_are_variables_inside(executor: OciExecutor) -> None:
    given = (
        GenericResource(named_resource_spec=NamedResource(kind="gpu", value="UUID1")),
        GenericResource(discrete_resource_spec=DiscreteResource(kind="ssd", value=2)),
    )
    task = a_task("sh", "-c", "env | grep DOCKER_RESOURCE | sort")
    task = msgspec.structs.replace(task, task=msgspec.structs.replace(task.task, generic_resources=given))
    assert await output(executor, task) == "DOCKER_RESOURCE_GPU=UUID1\nDOCKER_RESOURCE_SSD=2\n"


async def test_a_templated_config_is_expanded_for_its_task_and_outlives_the_node_process(
    lab: Lab, executor: OciExecutor
) -> None:
    golang = Driver(name="golang")
    executor.payloads.put(
        [SecretFile(id=SecretId("s1"), data=b"hush")],
        [
            ConfigFile(
                id=ConfigId("c1"), data=b'{{.Service.Name}} {{secret "key"}} {{env "A"}}\n', templating=golang
            )
        ],
    )
    key = SecretReference(secret_id=SecretId("s1"), file=FileTarget(name="key"))
    site = ConfigReference(config_id=ConfigId("c1"), file=FileTarget(name="/site"))
    task = a_task("cat", "/site", secrets=(key,), configs=(site,), env=("A={{.Node.ID}}",))
    assert await output(executor, task) == "web hush node1\n"
    Payloads(lab.paths.secrets).keep_only([SecretId("s1")], [ConfigId("c1")])
    assert await output(executor, a_task("cat", "/site", secrets=(key,), configs=(site,))) == "web hush \n"
    executor.payloads.keep_only([], [])
    assert [path for path in lab.paths.secrets.rglob("known/*/*") if path.is_file()] == []


async def test_a_template_that_fails_is_its_tasks_failure(executor: OciExecutor) -> None:
    payloads = {"mustache": b"x", "golang": b'{{secret "none"}}'}
    errors = {"mustache": "unrecognized template type", "golang": "secret target none not found"}
    for driver, data in payloads.items():
        config = ConfigFile(id=ConfigId("c1"), data=data, templating=Driver(name=driver))
        executor.payloads.put([], [config])
        reference = ConfigReference(config_id=ConfigId("c1"), file=FileTarget(name="/x"))
        controller = executor.controller(a_task("true", configs=(reference,)))
        await controller.prepare()
        problem = f"starting container failed: unable to get config from config store: .*{errors[driver]}"
        with pytest.raises(SkepError, match=problem):
            await controller.start()


async def test_a_missing_secret_is_found_at_the_start(executor: OciExecutor) -> None:
    reference = SecretReference(secret_id=SecretId("gone"), secret_name="x", file=FileTarget(name="x"))
    controller = executor.controller(a_task("true", secrets=(reference,)))
    await controller.prepare()
    with pytest.raises(SkepError, match="unable to get secret from secret store: secret gone not found"):
        await controller.start()


async def test_a_volume_keeps_its_files_and_begins_with_the_images(lab: Lab, executor: OciExecutor) -> None:
    mount = Mount(type="volume", source="data", target="/etc")
    assert "alice" in await output(
        executor, a_task("sh", "-c", "cat /etc/passwd; echo kept >/etc/new", mounts=(mount,))
    )
    bare = Mount(type="volume", source="data", target="/data")
    assert await output(executor, a_task("cat", "/data/new", mounts=(bare,))) == "kept\n"
    empty = Mount(type="volume", source="other", target="/etc", volume_options=VolumeOptions(no_copy=True))
    assert "passwd" not in await output(executor, a_task("ls", "/etc", mounts=(empty,)))
    nameless = Mount(type="volume", target="/scratch")
    await output(executor, a_task("touch", "/scratch/x", mounts=(nameless,)))
    assert sorted(path.name for path in lab.paths.volumes.iterdir()) == ["data", "other"]


async def test_mounts_that_cannot_be_are_rejected(executor: OciExecutor) -> None:
    for mount, words in (
        (Mount(type="bind", source="/nosuch", target="/x"), "bind source path does not exist: /nosuch"),
        (
            Mount(type="volume", source="a/b", target="/x"),
            "includes invalid characters for a local volume name",
        ),
        (
            Mount(type="volume", source="a", target="/x"),
            "create a: volume name is too short, names should be",
        ),
        (Mount(type="npipe", source="x", target="/x"), "not supported"),
        (Mount(type="tmpfs", target="relative"), "must be an absolute path"),
    ):
        with pytest.raises(Rejected, match=words):
            await executor.controller(a_task("true", mounts=(mount,))).prepare()
    assert await executor.leftovers() == []


async def test_tmpfs_has_its_size_and_mode(executor: OciExecutor) -> None:
    mount = Mount(type="tmpfs", target="/scratch", tmpfs_options=TmpfsOptions(size_bytes=65536, mode=0o1770))
    text = await output(
        executor, a_task("sh", "-c", "stat -c %a /scratch; mount | grep /scratch", mounts=(mount,))
    )
    assert text.startswith("1770\n")
    assert "size=64k" in text
    assert "noexec" in text


async def test_published_ports_are_reported_as_opened(executor: OciExecutor) -> None:
    port = PortConfig(target_port=80, published_port=0, publish_mode=PublishMode.HOST)
    ingress = PortConfig(target_port=81, published_port=8081)
    controller = executor.controller(a_task("sleep", "100", ports=(port, ingress)))
    await controller.prepare()
    running = await controller.start()
    (opened,) = running.ports
    assert (opened.target_port, opened.publish_mode) == (80, PublishMode.HOST)
    assert opened.published_port > 0


async def test_new_limits_are_taken_over_without_a_restart(executor: OciExecutor) -> None:
    task = a_task("sleep", "100")
    controller = executor.controller(task)
    await controller.prepare()
    before = await controller.start()
    spec = msgspec.structs.replace(
        task.task.spec, resources=ResourceRequirements(limits=Limits(memory_bytes=64 << 20, pids=9))
    )
    await controller.update(msgspec.structs.replace(task, task=msgspec.structs.replace(task.task, spec=spec)))
    stats = await executor.engine.stats(task.name)
    assert (stats.memory_stats.limit, stats.pids_stats.limit) == (64 << 20, 9)
    assert controller.observed() == before


async def test_log_options_are_checked(executor: OciExecutor) -> None:
    for driver, words in (
        (Driver(name="nosuch"), "logger: no log driver named 'nosuch' is registered"),
        (Driver(name="json-file", options={"max-size": "lots"}), "invalid size: 'lots'"),
        (Driver(name="json-file", options={"max-file": "0"}), "max-file cannot be less than 1"),
    ):
        with pytest.raises(Rejected, match=words):
            await executor.controller(a_task("true", log_driver=driver)).prepare()


async def test_the_logs_of_a_service_are_gathered_from_its_tasks(executor: OciExecutor) -> None:
    logs = TaskLogs(executor.engine)
    tasks = [a_task("sh", "-c", f"echo out {slot}; echo err >&2", slot=slot) for slot in (1, 2)]
    other = msgspec.structs.replace(a_task("echo", "other"))
    other = msgspec.structs.replace(
        other, task=msgspec.structs.replace(other.task, service_id=ServiceId("service2"))
    )
    for task in (*tasks, other):
        controller = executor.controller(task)
        await controller.prepare()
        await controller.start()
        await controller.wait()
    query = LogQuery(services=(ServiceId("service1"),), streams=(LogStream.STDOUT,))
    lines = [line async for batch in logs.read_lines(query) for line in batch]
    assert {(line.task_id, line.data) for line in lines} == {
        (tasks[0].task.id, b"out 1\n"),
        (tasks[1].task.id, b"out 2\n"),
    }
    assert {(line.service_id, line.node_id) for line in lines} == {("service1", "node1")}
    of_one = LogQuery(tasks=(tasks[0].task.id,), tail=1)
    one = [line.data async for batch in logs.read_lines(of_one) for line in batch]
    assert one == [b"err\n"]


async def test_followed_logs_go_on_with_tasks_that_come_later(executor: OciExecutor) -> None:
    logs = TaskLogs(executor.engine)
    first, second = a_task("sh", "-c", "echo first; sleep 100"), a_task("echo", "second")
    for_first = executor.controller(first)
    await for_first.prepare()
    await for_first.start()
    entries = logs.read_lines(LogQuery(services=(ServiceId("service1"),), follow=True))
    async with asyncio.timeout(10):
        lines = [line.data for batch in [await anext(entries), await anext(entries)] for line in batch]
        assert lines == [b"first\n"], "with an empty batch before or after it: what there was has come"
        for_second = executor.controller(second)
        await for_second.prepare()
        await for_second.start()
        assert [line.data for line in await anext(entries)] == [b"second\n"]
    await entries.aclose()  # type: ignore[attr-defined]


async def test_everything_of_a_task_is_removed_with_it(
    lab: Lab, executor: OciExecutor, tmp_path: Path
) -> None:
    executor.payloads.put([SecretFile(id=SecretId("s1"), data=b"x")], [])
    reference = SecretReference(
        secret_id=SecretId("s1"), secret_name="x", file=FileTarget(name="x", mode=0o444)
    )
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    mount = Mount(type="volume", target="/scratch")
    task = a_task("sleep", "100", ports=(port,), secrets=(reference,), mounts=(mount,))
    controller = executor.controller(task)
    await controller.prepare()
    await controller.start()
    await controller.remove()
    assert lab.remains() == []
    assert list((lab.paths.secrets / "files").iterdir()) == []
    assert list(lab.paths.volumes.iterdir()) == []
    assert "8080" not in await lab.in_home("nft", "list", "ruleset")
    assert ":8080" not in await lab.in_home("ss", "-lnt")


async def test_a_read_only_mount_is_read_only_below_unless_the_task_asks_for_less(
    executor: OciExecutor,
) -> None:
    """``/dev/shm`` is a mount of its own below ``/dev``."""
    kept = Path("/dev/shm") / f"skep-{new_id()}"

    def mount(**options: bool) -> Mount:
        return Mount(
            type="bind", source="/dev", target="/d", read_only=True, bind_options=BindOptions(**options)
        )

    write = ("sh", "-c", f"touch /d/shm/{kept.name} && echo written")
    try:
        for options in ({}, {"read_only_force_recursive": True}):
            assert "Read-only file system" in await output(
                executor, a_task(*write, mounts=(mount(**options),))
            )
            assert not kept.exists()
        above = mount(read_only_non_recursive=True)
        assert await output(executor, a_task(*write, mounts=(above,))) == "written\n"
    finally:
        kept.unlink(missing_ok=True)


async def test_invalid_volume_options_reject_the_task(executor: OciExecutor) -> None:
    nfs = {"type": "nfs", "device": ":/x"}
    executor.engine.volumes.ensure("made", None, nfs)
    for source, options, said in (
        ("other", {**nfs, "bogus": "1"}, 'create other: invalid option: "bogus"'),
        ("other", {"device": ":/x"}, 'create other: missing required option: "type"'),
        ("other", {"size": "1g"}, "create other: quota size requested but no quota support"),
        (
            "made",
            {**nfs, "o": "addr=10.0.0.1"},
            "volume made exists with other options than the mount: use the same options, or another volume",
        ),
    ):
        given = VolumeOptions(driver_config=Driver(name="local", options=options))
        mount = Mount(type="volume", source=source, target="/data", volume_options=given)
        with pytest.raises(Rejected, match=said):
            await executor.controller(a_task("true", mounts=(mount,))).prepare()
    outside = Mount(
        type="volume", source="other", target="/data", volume_options=VolumeOptions(subpath="../made")
    )
    with pytest.raises(Rejected, match="subpath must be a relative path within the volume"):
        await executor.controller(a_task("true", mounts=(outside,))).prepare()
    assert executor.engine.volumes.names() == ["made"]
