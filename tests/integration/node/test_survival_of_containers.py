"""Containers outlive the process that started them, and their monitors."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from skep.engine.containers.container import ContainerState, LogConfig, LogFilter
from skep.engine.containers.request import CreateRequest, HostConfig
from skep.engine.engine import Engine
from skep.engine.runtime.processes import is_alive
from skep.linux import syscalls
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.runc_lab import IMAGE, Lab

ROOT = Path(__file__).parents[3]


async def test_a_restart_finds_running_containers_and_their_exit_code(lab: Lab) -> None:
    first = lab.executor()
    async with first.running():
        run = Runner(lab, first.engine)
        container = await run.start(
            "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done; echo went; exit 9"
        )
    assert container.process is not None
    assert is_alive(container.process)
    second = lab.executor()
    async with second.running():
        assert second.engine.get(container.id) == container
        (second.engine.bundles.rootfs(container.id) / "tmp/go").touch()
        ended = await second.engine.wait(container.id)
        assert ended.exit_code == 9
        lines = [entry.data async for entry in second.engine.logs(container.id, LogFilter())]
        assert lines == [b"went\n"]


async def test_containers_that_ended_unobserved_are_settled_at_the_next_start(lab: Lab) -> None:
    first = lab.executor()
    async with first.running():
        container = await Runner(lab, first.engine).start("sh", "-c", "sleep 0.2; exit 6")
        monitor = container.monitor
    assert monitor is not None
    await eventually(lambda: not is_alive(monitor), "it ended")
    second = lab.executor()
    async with second.running():
        ended = await second.engine.wait(container.id)
        assert (ended.state, ended.exit_code) == (ContainerState.EXITED, 6)
        await second.engine.remove(container.id)
    assert lab.remains() == []


async def test_a_step_of_a_build_ends_with_the_process_that_built_and_its_secret_is_in_no_file(
    lab: Lab,
) -> None:
    command = "case $TOKEN in hush*) touch /tmp/ok;; esac; sleep 600"
    request = CreateRequest(
        image=IMAGE, cmd=("sh", "-c", command), host_config=HostConfig(network_mode="none")
    )
    first = lab.executor()
    async with first.running():
        step = await first.engine.create(request, name="build-0123", is_step=True)
        kept = await first.engine.create(request, name="build-4567")
        await first.engine.start(step.id, secret_env=("TOKEN=hush-7391",))
        made = first.engine.bundles.path(step.id) / "upper/tmp/ok"
        await eventually(made.exists, "its command has the secret")
        files = [path for path in lab.paths.data.rglob("*") if path.is_file()]
        assert files
        assert not [path for path in files if b"hush-7391" in path.read_bytes()]
    second = lab.executor()
    async with second.running():
        await eventually(lambda: not second.engine.has(step.id), "the step is gone", within_s=30)
        assert [one.id for one in second.engine.list()] == [kept.id]
        await second.engine.remove(kept.id)
    assert lab.remains() == []


async def test_a_killed_node_process_takes_no_container_with_it(lab: Lab) -> None:
    """A process of its own starts a container and is killed with SIGKILL, with its whole process group."""
    script = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from skep.dataplane.netns.kernel.namespaces import Namespaces
        from skep.engine.containers.container import ContainerConfig, NewContainer
        from tests.support.networks.reservations import OwnReservations
        from skep.paths import Paths
        from tests.support.engine.runc_lab import TreeImages, an_executor

        async def main():
            paths = Paths(Path({str(lab.paths.data)!r}), Path({str(lab.paths.run)!r}))
            namespaces = Namespaces(paths.netns, Path({str(lab.home)!r}))
            executor = an_executor(paths, TreeImages(Path({str(lab.tree)!r})), {lab.cgroup_parent!r}, namespaces,
                OwnReservations(namespaces))
            async with executor.running():
                config = ContainerConfig(path="sleep", args=("100",))
                made = await executor.engine.add(NewContainer(
                    name="c", image="i", image_id="i", layers=({str(lab.tree)!r},), config=config))
                await executor.engine.start(made.id)
                print("started", flush=True)
                await asyncio.sleep(100)

        asyncio.run(main())
    """)
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT
    )
    assert node.stdout is not None
    assert await node.stdout.readline() == b"started\n"
    os.killpg(node.pid, signal.SIGKILL)
    await node.wait()
    executor = lab.executor()
    async with executor.running():
        (container,) = executor.engine.list()
        assert container.process is not None
        assert container.monitor is not None
        assert is_alive(container.process)
        assert is_alive(container.monitor)
        await executor.engine.kill(container.id)
        assert (await executor.engine.wait(container.id)).exit_code == 137


async def test_without_its_monitor_a_container_runs_on_and_its_exit_code_is_unknown(
    run: Runner, engine: Engine
) -> None:
    container = await run.start("sh", "-c", "sleep 0.5; exit 4")
    assert container.monitor is not None
    assert container.process is not None
    os.kill(container.monitor.pid, signal.SIGKILL)
    await eventually(lambda: not is_alive(container.monitor), "the monitor is gone")  # type: ignore[arg-type]
    assert is_alive(container.process)
    assert engine.get(container.id).is_running
    ended = await engine.wait(container.id)
    assert ended.exit_code == 255
    assert "monitor was lost" in ended.error


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[Path]:
    """The data directory of ``lab`` as a disk of 4 MB and 1,000 files."""
    lab.paths.data.mkdir()
    syscalls.mount("skep-disk", lab.paths.data, "tmpfs", 0, "size=4m,nr_inodes=1000")
    try:
        yield lab.paths.data
    finally:
        syscalls.unmount(lab.paths.data, syscalls.MNT_DETACH)


async def test_the_end_of_a_container_whose_log_fills_the_disk_is_seen_with_its_exit_code(
    lab: Lab, small_disk: Path
) -> None:
    executor = lab.executor()
    async with executor.running():
        run = Runner(lab, executor.engine)
        container = await run.start("sh", "-c", f"yes 0123456789abcdef | head -c {5 << 20}; exit 5")
        async with asyncio.timeout(30):
            ended = await executor.engine.wait(container.id)
        assert os.statvfs(small_disk).f_bavail == 0
        assert (ended.state, ended.exit_code, ended.error) == (ContainerState.EXITED, 5, "")
        await executor.engine.remove(container.id)
    assert lab.remains() == []


async def test_a_disk_without_room_for_another_file_ends_no_monitor_that_is_to_begin_another_log(
    lab: Lab, small_disk: Path
) -> None:
    executor = lab.executor()
    async with executor.running():
        engine = executor.engine
        container = await Runner(lab, engine).start(
            "sh",
            "-c",
            "trap 'echo last; exit 5' TERM; while :; do seq 10; sleep 0.05; done",
            log=LogConfig(max_size_bytes=100, max_files=2),
        )
        with capture_logs() as lines:
            with suppress(OSError):
                for number in count():
                    (small_disk / f"filler-{number}").touch()
            await eventually(lambda: "log not rotated" in [one["event"] for one in lines], "its log is due")
            for _ in range(2):
                engine.log_rotation.rotate(container)
        logged = [one for one in lines if one["event"] == "log not rotated" and one["log_level"] != "debug"]
        assert len(logged) == 1, "an error that lasts is logged once"
        async with asyncio.timeout(30):
            await engine.kill(container.id, "SIGTERM")
            ended = await engine.wait(container.id)
        assert (ended.exit_code, ended.error) == (5, "")
        assert (await Runner(lab, engine).logs(container)).endswith("last\n")
        await engine.remove(container.id)


async def test_a_container_that_was_made_but_not_started_can_be_started_after_a_restart(lab: Lab) -> None:
    first = lab.executor()
    async with first.running():
        container = await Runner(lab, first.engine).create("sh", "-c", "exit 3")
    second = lab.executor()
    async with second.running():
        await second.engine.start(container.id)
        assert (await second.engine.wait(container.id)).exit_code == 3


async def test_directories_without_a_record_are_removed(lab: Lab) -> None:
    leftover = lab.paths.containers / ("f" * 64)
    (leftover / "upper").mkdir(parents=True)
    (leftover / "record").write_text('{"torn')
    executor = lab.executor()
    async with executor.running():
        assert executor.engine.list() == []
        await eventually(lambda: not leftover.exists(), "the directory is removed")


async def test_a_record_torn_while_it_was_written_has_its_predecessor(lab: Lab) -> None:
    first = lab.executor()
    async with first.running():
        container = await Runner(lab, first.engine).create("true")
    with (lab.paths.containers / container.id / "record").open("a") as record:
        record.write('\n{"id": "')
    second = lab.executor()
    async with second.running():
        assert second.engine.get(container.id).name == container.name
        await second.engine.start(container.id)
        assert (await second.engine.wait(container.id)).exit_code == 0


async def test_monitors_sit_in_a_cgroup_of_their_own(lab: Lab, run: Runner) -> None:
    container = await run.start("sleep", "100")
    assert container.monitor is not None
    lines = Path(f"/proc/{container.monitor.pid}/cgroup").read_text().splitlines()
    places = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines}
    assert places["memory" if "memory" in places else ""] == f"/{lab.cgroup_parent}/monitors"


async def test_a_container_whose_record_is_damaged_is_ended_and_removed(lab: Lab) -> None:
    """Its configuration is lost, so it must not continue unmanaged."""
    first = lab.executor()
    async with first.running():
        container = await Runner(lab, first.engine).start("sleep", "100")
        directory = first.engine.bundles.path(container.id)
    process = container.process
    assert process is not None
    (directory / "record").write_bytes(b"{")
    second = lab.executor()
    async with second.running():
        assert second.engine.list() == []
        await eventually(lambda: not is_alive(process), "it ended")
        await eventually(lambda: not lab.remains(), "nothing of it is left")
