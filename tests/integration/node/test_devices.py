"""What a container is given of its machine, seen from inside: devices, namespaces, limits, mounts of others."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skep.agent.executor.oci import OciExecutor
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container, NotRunning
from skep.engine.containers.request import read_create
from skep.engine.engine import Engine
from skep.errors import FailedPrecondition, InvalidArgument, SkepError
from tests.integration.node.conftest import Runner
from tests.integration.node.test_oci_tasks import a_task, output
from tests.support.engine.runc_lab import IMAGE, Lab

ZERO = {"PathOnHost": "/dev/zero", "PathInContainer": "/dev/mine", "CgroupPermissions": "rwm"}
FORBIDDEN = "Operation not permitted"


class Plain:
    """Makes plain containers as ``docker run`` does."""

    def __init__(self, engine: Engine, run: Runner) -> None:
        self.engine = engine
        self._run = run

    async def create(
        self, *command: str, host: Mapping[str, Any], name: str = "", **config: Any
    ) -> Container:
        body = {"Image": IMAGE, "Cmd": list(command), "HostConfig": dict(host), **config}
        return await self.engine.create(read_create(msgspec.json.encode(body)), name=name)

    async def start(self, *command: str, host: Mapping[str, Any], name: str = "", **config: Any) -> Container:
        created = await self.create(*command, host=host, name=name, **config)
        return await self.engine.start(created.id)

    async def output(self, script: str, **host: Any) -> str:
        """What a shell in such a container prints, on both streams."""
        container = await self.start("sh", "-c", script, host=host)
        await self.engine.wait(container.id)
        text = await self._run.logs(container)
        await self.engine.remove(container.id, with_volumes=True)
        return text


@pytest.fixture
def plain(engine: Engine, run: Runner) -> Plain:
    return Plain(engine, run)


def namespace(kind: str) -> str:
    """The machine's, as /proc shows it."""
    return os.readlink(f"/proc/self/ns/{kind}")


# --- devices -----------------------------------------------------------------------------------------------------


async def test_a_named_device_opens_and_no_other_does(plain: Plain, lab: Lab) -> None:
    script = (
        "head -c 3 /dev/mine | wc -c; stat -c '%t:%T' /dev/mine;"
        " busybox mknod /tmp/port c 1 4; cat /tmp/port; ls /dev/kmsg"
    )
    (lab.tree / "bin/wc").symlink_to("busybox")
    text = await plain.output(script, Devices=[ZERO])
    assert text.splitlines()[:2] == ["3", "1:5"]
    assert f"can't open '/tmp/port': {FORBIDDEN}" in text
    assert "/dev/kmsg: No such file" in text


@pytest.mark.parametrize(("access", "opened"), [("rw", "ok"), ("r", FORBIDDEN)])
async def test_a_device_opens_only_as_its_permissions_have_it(plain: Plain, access: str, opened: str) -> None:
    device = {"PathOnHost": "/dev/kmsg", "PathInContainer": "/dev/log0", "CgroupPermissions": access}
    script = "busybox true < /dev/log0 && true >> /dev/log0 && echo ok"
    text = await plain.output(script, Devices=[device], CapAdd=["SYSLOG"])
    assert opened in text


async def test_a_directory_stands_for_the_devices_in_it(plain: Plain, tmp_path: Path) -> None:
    (tmp_path / "dev" / "inner").mkdir(parents=True)
    os.mknod(tmp_path / "dev" / "one", 0o20666, os.makedev(1, 5))
    os.mknod(tmp_path / "dev" / "inner" / "two", 0o20666, os.makedev(1, 3))
    (tmp_path / "dev" / "plain").write_text("no device")
    directory = {"PathOnHost": str(tmp_path / "dev"), "PathInContainer": "/dev/all"}
    text = await plain.output("cd /dev/all; stat -c '%n %t:%T' one inner/*; ls", Devices=[directory])
    assert text.split() == ["one", "1:5", "inner/two", "1:3", "inner", "one"]


async def test_a_rule_opens_every_device_of_its_numbers(plain: Plain) -> None:
    script = "busybox mknod /tmp/log c 1 11; busybox true < /tmp/log && echo ok"
    assert FORBIDDEN in await plain.output(script, CapAdd=["SYSLOG"])
    assert await plain.output(script, CapAdd=["SYSLOG"], DeviceCgroupRules=["c 1:* r"]) == "ok\n"
    assert "nonexistent directory" in await plain.output(
        "true >> /tmp/no/log", DeviceCgroupRules=["a *:* rwm"]
    )


async def test_a_missing_device_is_refused_in_dockers_words(plain: Plain, tmp_path: Path, lab: Lab) -> None:
    (tmp_path / "file").touch()
    words = "error gathering device information while adding custom device"
    for path, reason in (
        ("/dev/nosuch", "no such file or directory"),
        (str(tmp_path / "file"), "not a device node"),
    ):
        with pytest.raises(FailedPrecondition, match=f'{words} "{path}": {reason}'):
            await plain.create("true", host={"Devices": [{"PathOnHost": path, "PathInContainer": path}]})
    assert lab.remains() == []


async def test_a_privileged_container_has_what_its_node_has(
    plain: Plain, engine: Engine, run: Runner
) -> None:
    script = (
        "grep Cap /proc/self/status; grep Seccomp: /proc/self/status; ls /dev/kmsg /dev/loop-control;"
        " busybox true < /dev/kmsg && echo opened;"
        " grep -c ' /proc/sys ' /proc/mounts; grep ' /sys sysfs' /proc/mounts"
    )
    container = await plain.start("sh", "-c", f"{script}; sleep 100", host={"Privileged": True})
    bounding = next(line for line in Path("/proc/self/status").read_text().splitlines() if "CapBnd" in line)
    own = await plain.output("grep CapBnd /proc/self/status", Privileged=True)
    assert own.split() == bounding.split()
    text = ""
    while "sysfs" not in text:
        text = await run.logs(container)
        assert engine.get(container.id).is_running
    assert "Seccomp:\t0" in text
    assert "opened" in text
    assert "\n0\n" in text, "nothing of /proc/sys is read-only"
    assert " rw," in text.splitlines()[-1]


async def test_an_ordinary_container_has_none_of_it(plain: Plain) -> None:
    text = await plain.output(
        "ls /dev; grep Seccomp: /proc/self/status; grep ' /sys sysfs' /proc/mounts; grep -c ' /proc/sys ' /proc/mounts"
    )
    assert "kmsg" not in text
    assert "Seccomp:\t2" in text
    assert " ro," in text
    assert text.splitlines()[-1] == "1"


def describe_gpus(directory: Path) -> None:
    """Two GPUs in a file of CDI's, where the executor of ``directory``'s lab looks."""
    (directory / "driver").write_text("the driver's library\n")
    description = {
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/gpu",
        "containerEdits": {"env": ["DRIVER=1"]},
        "devices": [
            {
                "name": str(number),
                "containerEdits": {
                    "env": [f"GPU{number}=yes"],
                    "deviceNodes": [{"path": f"/dev/gpu{number}", "hostPath": "/dev/zero"}],
                    "mounts": [
                        {"hostPath": str(directory / "driver"), "containerPath": f"/usr/lib/{number}.so"}
                    ],
                },
            }
            for number in (0, 1)
        ],
    }
    (directory / "cdi").mkdir()
    (directory / "cdi" / "vendor.json").write_bytes(msgspec.json.encode(description))


async def test_a_gpu_is_what_its_description_says(plain: Plain, tmp_path: Path) -> None:
    describe_gpus(tmp_path)
    script = "env | grep -e GPU -e DRIVER | busybox sort; ls /dev/gpu* /usr/lib; busybox cat /usr/lib/1.so"
    one = [{"Driver": "cdi", "DeviceIDs": ["vendor.com/gpu=1"]}]
    text = await plain.output(script, DeviceRequests=one)
    assert text.splitlines() == [
        "DRIVER=1",
        "GPU1=yes",
        "/dev/gpu1",
        "",
        "/usr/lib:",
        "1.so",
        "the driver's library",
    ]
    every = [{"Count": -1, "Capabilities": [["gpu"]]}]
    assert "GPU0=yes\nGPU1=yes" in await plain.output(script, DeviceRequests=every)
    missing = [{"Driver": "cdi", "DeviceIDs": ["vendor.com/gpu=7"]}]
    with pytest.raises(FailedPrecondition, match=r"unresolvable CDI devices vendor\.com/gpu=7"):
        await plain.create("true", host={"DeviceRequests": missing})


# --- namespaces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "option"),
    [("pid", "PidMode"), ("ipc", "IpcMode"), ("uts", "UTSMode"), ("cgroup", "CgroupnsMode")],
)
async def test_namespaces_of_the_machine_are_shared(plain: Plain, kind: str, option: str) -> None:
    script = f"busybox readlink /proc/self/ns/{kind}"
    assert await plain.output(script, **{option: "host"}) == f"{namespace(kind)}\n"
    assert await plain.output(script, **{option: "private"} if kind != "uts" and kind != "pid" else {}) != (
        f"{namespace(kind)}\n"
    )


async def test_processes_of_a_container_without_a_pid_namespace_end_with_it(
    plain: Plain, engine: Engine, lab: Lab
) -> None:
    command = ("sh", "-c", "busybox setsid sleep 1000 & sleep 0.2; exit 3")
    container = await plain.start(*command, host={"PidMode": "host"})
    assert (await engine.wait(container.id)).exit_code == 3
    await engine.remove(container.id)
    assert lab.remains() == []


async def test_namespaces_of_another_container_are_shared(plain: Plain, lab: Lab, engine: Engine) -> None:
    donor = await plain.start(
        "sh",
        "-c",
        "echo here > /dev/shm/note; sleep 100",
        host={"IpcMode": "shareable"},
        name="donor",
        Hostname="dd",
    )
    script = "for one in net pid ipc; do busybox readlink /proc/self/ns/$one; done; hostname; cat /dev/shm/note; ps"
    shared = await plain.output(
        script, NetworkMode="container:donor", PidMode="container:donor", IpcMode="container:donor"
    )
    namespaces = [os.readlink(f"/proc/{donor.pid}/ns/{one}") for one in ("net", "pid", "ipc")]
    lines = shared.splitlines()
    assert lines[:5] == [*namespaces, "dd", "here"]
    assert any("sleep 100" in line for line in lines)
    named = await plain.create("true", host={"NetworkMode": "container:donor"}, name="second")
    assert named.network_mode == f"container:{donor.id}"
    for one in (named, donor):
        await engine.remove(one.id, force=True)
    assert lab.remains() == []


async def test_a_namespace_that_cannot_be_shared_is_refused_in_dockers_words(
    plain: Plain, engine: Engine
) -> None:
    donor = await plain.create("sleep", "100", host={}, name="donor")
    for host, words in (
        ({"NetworkMode": "container:donor"}, f"cannot join network of a non running container: {donor.id}"),
        ({"PidMode": "container:donor"}, f"container {donor.id} is not running"),
        (
            {"IpcMode": "container:donor"},
            f"can't join IPC of container {donor.id}: container {donor.id} is not running",
        ),
    ):
        created = await plain.create("true", host=host)
        with pytest.raises(NotRunning, match=words):
            await engine.start(created.id)
    await engine.start(donor.id)
    created = await plain.create("true", host={"IpcMode": "container:donor"})
    with pytest.raises(InvalidArgument, match="non-shareable IPC"):
        await engine.start(created.id)
    with pytest.raises(InvalidArgument, match="No such container: nosuch"):
        await plain.create("true", host={"NetworkMode": "container:nosuch"})


# --- mounts ------------------------------------------------------------------------------------------------------


async def test_volumes_of_another_container_are_mounted_and_outlive_it(plain: Plain, engine: Engine) -> None:
    first = await plain.start(
        "sh", "-c", "echo kept > /data/file", host={}, name="first", Volumes={"/data": {}}
    )
    await engine.wait(first.id)
    second = await plain.create("cat", "/data/file", host={"VolumesFrom": ["first:ro"]})
    await engine.remove(first.id, with_volumes=True)
    assert (await engine.start(second.id)).config.mounts[0].read_only
    assert (await engine.wait(second.id)).exit_code == 0
    volumes = engine.volumes.names()
    await engine.remove(second.id, with_volumes=True)
    assert [name for name in volumes if name in engine.volumes.names()] == []


# --- limits ------------------------------------------------------------------------------------------------------


async def test_limits_are_the_kernels(plain: Plain, lab: Lab) -> None:
    container = await plain.start(
        "sleep",
        "100",
        host={
            "CpuShares": 512,
            "CpusetCpus": "0",
            "Memory": 64 << 20,
            "MemorySwap": 96 << 20,
            "MemorySwappiness": 10,
            "PidsLimit": 77,
            "OomKillDisable": True,
        },
    )
    groups = Cgroups(lab.cgroup_parent)

    def value(controller: str, name: str) -> str:
        directory = groups.directory(container, controller)
        assert directory is not None
        return (directory / name).read_text().split("\n")[0]

    assert value("pids", "pids.max") == "77"
    if groups.is_v2:
        assert value("cpu", "cpu.weight") == "20"
        assert value("memory", "memory.swap.max") == str(32 << 20)
        assert value("cpuset", "cpuset.cpus") == "0"
        assert [one for one in container.warnings if "swappiness" in one and "discarded" in one]
        assert [one for one in container.warnings if "OomKillDisable discarded" in one]
        return
    assert value("cpu", "cpu.shares") == "512"
    assert value("cpuset", "cpuset.cpus") == "0"
    if groups.has_swap_accounting:
        assert value("memory", "memory.memsw.limit_in_bytes") == str(96 << 20)
    assert value("memory", "memory.swappiness") == "10"
    assert value("memory", "memory.oom_control") == "oom_kill_disable 1"


async def test_limits_of_block_devices_are_the_kernels(plain: Plain, lab: Lab) -> None:
    device = next(one for name in sorted(os.listdir("/sys/block")) if (one := Path("/dev", name)).exists())
    number = device.stat().st_rdev
    shown = f"{os.major(number)}:{os.minor(number)}"
    limit = {"Path": str(device), "Rate": 1 << 20}
    groups = Cgroups(lab.cgroup_parent)
    has_weight = groups.has_io_weight  # as the engine has found: the first group shows it
    container = await plain.start(
        "sleep",
        "100",
        host={"BlkioDeviceReadBps": [limit], "BlkioDeviceWriteIOps": [limit], "BlkioWeight": 100},
    )
    directory = groups.directory(container, "blkio")
    assert directory is not None
    if groups.is_v2:
        assert (
            (directory / "io.max")
            .read_text()
            .startswith(f"{shown} rbps={1 << 20} wbps=max riops=max wiops={1 << 20}")
        )
    else:
        assert (directory / "blkio.throttle.read_bps_device").read_text() == f"{shown} {1 << 20}\n"
        assert (directory / "blkio.throttle.write_iops_device").read_text() == f"{shown} {1 << 20}\n"
    discarded = [one for one in container.warnings if "Block I/O weight" in one]
    assert bool(discarded) is not has_weight


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ({"MemorySwap": 1 << 30}, "You should always set the Memory limit when using Memoryswap limit"),
        (
            {"Memory": 64 << 20, "MemorySwap": 1 << 20},
            "Minimum memoryswap limit should be larger than memory limit",
        ),
        ({"MemorySwappiness": 101}, "Invalid value: 101, valid memory swappiness range is 0-100"),
        ({"CpusetCpus": "0-9999"}, "Requested CPUs are not available - requested 0-9999, available: 0"),
        ({"CpusetMems": "x"}, "Invalid value x for cpuset mems"),
        ({"BlkioWeight": 9}, "Range of blkio weight is from 10 to 1000"),
        ({"DeviceCgroupRules": ["c 1:3 x"]}, "invalid device cgroup rule format: 'c 1:3 x'"),
        ({"PidMode": "mine"}, "invalid PID mode: mine"),
        ({"OomScoreAdj": 1001}, "Invalid value 1001, range for oom score adj is"),
    ],
)
async def test_a_value_that_cannot_be_is_refused_in_dockers_words(
    plain: Plain, lab: Lab, host: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        await plain.create("true", host=host)
    assert lab.remains() == []


# --- tasks -------------------------------------------------------------------------------------------------------


async def test_a_task_is_privileged_and_has_the_gpus_that_its_labels_ask_for(
    executor: OciExecutor, tmp_path: Path
) -> None:
    describe_gpus(tmp_path)
    script = "grep Seccomp: /proc/self/status; echo $GPU0$GPU1; head -c 4 /dev/gpu1 | wc -c; ls /dev/kmsg /dev/gpu0"
    ordinary = await output(executor, a_task("sh", "-c", f"({script}) 2>/dev/null"))
    assert ordinary.split() == ["Seccomp:", "2", "0"]
    gpu = await output(
        executor, a_task("sh", "-c", f"({script}) 2>/dev/null", labels={"skep.devices": "vendor.com/gpu=1"})
    )
    assert gpu.split() == ["Seccomp:", "2", "yes", "4"]
    every = await output(
        executor, a_task("sh", "-c", script, labels={"skep.gpus": "all", "skep.privileged": "true"})
    )
    assert every.split() == ["Seccomp:", "0", "yesyes", "4", "/dev/gpu0", "/dev/kmsg"]
    missing = executor.controller(a_task("true", labels={"skep.devices": "vendor.com/gpu=7"}))
    with pytest.raises(SkepError, match=r"unresolvable CDI devices vendor\.com/gpu=7"):
        await missing.prepare()


async def test_what_the_node_could_not_give_a_task_is_reported_with_its_start(executor: OciExecutor) -> None:
    labels = {"skep.memory-swappiness": "7", "skep.blkio-weight": "100", "skep.shm-size": "3m"}
    task = a_task("sh", "-c", "sleep 100", labels=labels)
    groups = Cgroups("skep")
    expected = [("Memory swappiness", groups.is_v2), ("Block I/O weight", not groups.has_io_weight)]
    controller = executor.controller(task)
    await controller.prepare()
    running = await controller.start()
    for what, is_discarded in expected:
        assert any(what in one or what.lower() in one for one in running.warnings) is is_discarded, what
    assert executor.engine.list()[0].config.shm_bytes == 3 << 20
    observed = controller.observed()
    assert observed is not None
    assert observed.warnings == running.warnings
