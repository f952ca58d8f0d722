"""Volumes with options and parts of volumes: what is mounted, from when until when, and what a silent server stops."""

import asyncio
import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from skep.agent.executor.oci import OciExecutor
from skep.engine.volumes.mounts import copy_up
from skep.engine.volumes.volumes import MountFailed, Volumes, VolumeSubpath
from skep.errors import SkepError, Unavailable
from skep.linux.mounting import mount_targets
from skep.linux.syscalls import MNT_DETACH, MS_BIND, MS_PRIVATE, mount, unmount
from skep.model.container import BindOptions, Mount, VolumeOptions
from skep.model.task import AssignedTask
from skep.model.values.meta import Driver
from tests.integration.node.conftest import eventually
from tests.integration.node.test_oci_tasks import a_task, output
from tests.support.engine.runc_lab import Lab
from tests.support.storage.file_servers import silent_directory

MS_SHARED = 1 << 20
MEMORY = {"type": "tmpfs", "device": "tmpfs", "o": "size=64k,noexec"}


def with_options(
    source: str, options: dict[str, str], *, target: str = "/data", no_copy: bool = False
) -> Mount:
    given = VolumeOptions(driver_config=Driver(name="local", options=options), no_copy=no_copy)
    return Mount(type="volume", source=source, target=target, volume_options=given)


def part_of(source: str, subpath: str) -> Mount:
    return Mount(type="volume", source=source, target="/data", volume_options=VolumeOptions(subpath=subpath))


async def test_a_volume_with_options_is_mounted_from_its_first_task_to_its_last(
    lab: Lab, executor: OciExecutor
) -> None:
    path = str(executor.engine.volumes.path("memory"))
    first = executor.controller(
        a_task("sh", "-c", "echo kept >/data/file; sleep 100", mounts=(with_options("memory", MEMORY),))
    )
    await first.prepare()
    assert path not in mount_targets(), "no task of it runs"
    await first.start()
    assert path in mount_targets()
    script = "while ! cat /data/file; do sleep 0.1; done; stat -f -c %T /data; mount | grep /data"
    plain = Mount(type="volume", source="memory", target="/data")
    text = await output(executor, a_task("sh", "-c", script, mounts=(plain,)))
    assert "kept\ntmpfs\n" in text
    assert "noexec" in text
    assert "size=64k" in text
    assert path in mount_targets(), "the first task has it"
    await first.terminate()
    await first.wait()
    await eventually(lambda: path not in mount_targets(), "the volume is unmounted")
    await first.remove()
    assert lab.remains() == []


async def test_a_volume_stays_mounted_while_the_node_process_starts_again_and_an_unused_one_does_not(
    lab: Lab,
) -> None:
    mounts = (with_options("memory", MEMORY),)
    async with (one := lab.executor()).running():
        task = a_task("sh", "-c", "echo kept >/data/file; sleep 100", mounts=mounts)
        controller = one.controller(task)
        await controller.prepare()
        await controller.start()
        volumes = one.engine.volumes
        left = str(volumes.ensure("left", None, MEMORY))
        await volumes.mount(
            "a container that ends with the machine", volumes.mount_points([with_options("left", MEMORY)], ())
        )
        path = str(volumes.path("memory"))
    async with (two := lab.executor()).running():
        await eventually(lambda: left not in mount_targets(), "the unused volume is unmounted")
        assert path in mount_targets()
        assert await output(two, a_task("cat", "/data/file", mounts=mounts)) == "kept\n"
        await two.controller(task).terminate()
        await eventually(lambda: path not in mount_targets(), "the volume is unmounted")


async def test_a_volume_that_cannot_be_mounted_fails_its_task_with_the_kernels_reason(
    executor: OciExecutor,
) -> None:
    for name, options, reason in (
        (
            "nosuch",
            {"type": "none", "device": "/no/such", "o": "bind"},
            "mount /no/such:{path}, flags: 0x1000: no such file or directory",
        ),
        (
            "secret",
            {"type": "tmpfs", "device": "x", "o": "password=p4ss"},
            r"data: password=\*+: invalid argument",
        ),
        (
            "odd",
            {"type": "nosuchfs", "device": "x"},
            r"mount x:{path}: no such device \(the kernel of this node has no file system nosuchfs\)",
        ),
    ):
        path = executor.engine.volumes.path(name)
        controller = executor.controller(a_task("true", mounts=(with_options(name, options),)))
        await controller.prepare()
        said = f"error while mounting volume '{path}': failed to mount local volume: .*{reason.format(path=path)}$"
        with pytest.raises(SkepError, match=said):
            await controller.start()
        assert str(path) not in mount_targets()
        await controller.remove()


async def test_what_the_image_has_fills_an_empty_device_too(tmp_path: Path, executor: OciExecutor) -> None:
    for name, no_copy in (("filled", False), ("bare", True)):
        (tmp_path / name).mkdir()
        device = {"type": "none", "o": "bind", "device": str(tmp_path / name)}
        mount = with_options(name, device, target="/etc", no_copy=no_copy)
        text = await output(executor, a_task("cat", "/etc/passwd", mounts=(mount,)))
        assert ("alice" in text) != no_copy
        assert (tmp_path / name / "passwd").exists() != no_copy
    broken = with_options("broken", {"type": "nosuchfs", "device": "x"}, target="/etc")
    with pytest.raises(SkepError, match="failed to populate volume: error while mounting volume"):
        await executor.controller(a_task("true", mounts=(broken,))).prepare()
    assert not [one for one in executor.engine.list() if any(at.name == "broken" for at in one.config.mounts)]


async def test_a_part_of_a_volume_is_mounted_and_no_link_leads_out_of_it(
    lab: Lab, executor: OciExecutor
) -> None:
    volume = executor.engine.volumes.ensure("parts")
    (volume / "a" / "b").mkdir(parents=True)
    (volume / "a" / "b" / "file").write_text("inside\n")
    for link, leads_to in (("in", "a/b"), ("absolute", "/etc"), ("up", "../../..")):
        (volume / link).symlink_to(leads_to)
    for part, path in (("a/b", "/data/file"), ("in", "/data/file"), ("a/b/file", "/data")):
        assert await output(executor, a_task("cat", path, mounts=(part_of("parts", part),))) == "inside\n"
    for part, reason in (
        ("absolute", "path concatenation escapes the base directory"),
        ("up/etc", "path concatenation escapes the base directory"),
        ("nosuch", "cannot access path .*/nosuch: .*no such file or directory"),
    ):
        controller = executor.controller(a_task("true", mounts=(part_of("parts", part),)))
        await controller.prepare()
        with pytest.raises(SkepError, match=reason):
            await controller.start()
        await controller.remove()
    for container in executor.engine.list():
        await executor.engine.remove(container.id)
    assert not [target for target in mount_targets() if target.startswith(str(lab.paths.bundles))]


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """``one`` is by turns what it was and what ``other`` was, as fast as a thread can exchange them."""
    renameat2, exchange, ended = ctypes.CDLL(None).renameat2, 2, threading.Event()

    def swap() -> None:
        while not ended.is_set():
            renameat2(-100, os.fsencode(one), -100, os.fsencode(other), exchange)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


async def test_a_part_that_is_swapped_for_a_link_during_the_mount_is_it_or_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    volumes = Volumes(tmp_path / "volumes")
    volume = volumes.ensure("swapped")
    (volume / "part").mkdir()
    (volume / "part" / "mine").touch()
    (volume / "link").symlink_to(outside)
    seen = set()
    with swapping(volume / "part", volume / "link"):
        for number in range(12):
            part = VolumeSubpath("swapped", "part", tmp_path / "parts" / str(number))
            try:
                await volumes.mount("user", (), [part])
            except MountFailed as error:
                seen.add("escapes" if "escapes the base directory" in str(error) else str(error))
            else:
                seen.add(",".join(os.listdir(part.target)))
                await volumes.unmount("user", [part])
    assert seen <= {"mine", "escapes"}


@contextmanager
def directories_become_links(tree: Path, target: Path) -> Iterator[None]:
    """As soon as a directory is made in ``tree``, it is moved away, and a link to ``target`` is in its place."""
    ended = threading.Event()

    def replace() -> None:
        while not ended.is_set():
            for entry in os.scandir(tree):
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("moved-"):
                    os.rename(entry.path, tree / f"moved-{entry.name}")
                    os.symlink(target, entry.path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("is_mounted", [False, True])
async def test_a_volume_in_which_directories_become_links_while_it_is_filled_is_all_that_is_written(
    tmp_path: Path, *, is_mounted: bool
) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    for number in range(20):
        (root / "data" / str(number)).mkdir(parents=True)
        for file in range(50):
            (root / "data" / str(number) / str(file)).touch()
    for attempt in range(3):
        volume = tmp_path / str(attempt)
        volume.mkdir()
        with directories_become_links(volume, outside), suppress(Unavailable):
            await copy_up(root, "/data", volume, is_mounted=is_mounted)
        assert os.listdir(volume)
        assert not os.listdir(outside)


async def test_a_mount_point_in_a_volume_that_is_swapped_for_a_link_leads_nowhere_else(
    tmp_path: Path, executor: OciExecutor
) -> None:
    """One volume within another, which a further container changes while runc mounts them."""
    outside = tmp_path / "outside"
    outside.mkdir()
    volumes = executor.engine.volumes
    outer = volumes.ensure("outer")
    (outer / "within").mkdir()
    (outer / "link").symlink_to(outside)
    within = Mount(type="volume", source="inner", target="/data/within")
    mounts = (Mount(type="volume", source="outer", target="/data"), within)
    with swapping(outer / "within", outer / "link"):
        for slot in range(4):
            controller = executor.controller(a_task("touch", "/data/within/mine", slot=slot, mounts=mounts))
            await controller.prepare()
            try:
                await controller.start()
                await controller.wait()
            except SkepError:
                pass  # the link leads to nothing within the container
            finally:
                await controller.remove()
    assert not os.listdir(outside)
    assert not [target for target in mount_targets() if target.startswith(str(outside))]


async def test_a_mount_that_hangs_fails_its_container_alone(
    tmp_path: Path, lab: Lab, executor: OciExecutor
) -> None:
    engine = executor.engine
    engine.volumes.mount_deadline_s = 5.0
    with silent_directory(tmp_path / "silent") as silent:
        hanging = {"type": "none", "device": str(silent / "x"), "o": "bind"}
        stuck = []
        for number in range(2 * (os.cpu_count() or 1) + 2):  # more than may start at one time
            controller = executor.controller(
                a_task("true", slot=number, mounts=(with_options(f"far{number}", hanging),))
            )
            await controller.prepare()
            stuck.append(controller)
        async with asyncio.TaskGroup() as group:
            starts = [group.create_task(_failure(controller.start())) for controller in stuck]
            assert await output(executor, a_task("echo", "hello", slot=99)) == "hello\n"
            assert not any(start.done() for start in starts), "others start while mounts wait"
        for start in starts:
            assert "it takes longer than 5 s" in start.result()
        await stuck[0].remove()
        assert engine.volumes.names()


async def test_a_bind_source_that_hangs_fails_its_task_alone_and_stops_nothing_else(
    tmp_path: Path, lab: Lab, executor: OciExecutor
) -> None:
    executor.engine.volumes.bind_sources.deadline_s = 1.0
    source = tmp_path / "source"
    source.mkdir()
    made = executor.controller(
        a_task("true", slot=1, mounts=(Mount(type="bind", source=str(source), target="/x"),))
    )
    await made.prepare()
    source.rmdir()
    with silent_directory(source) as silent:
        never = executor.controller(
            a_task("true", slot=2, mounts=(Mount(type="bind", source=str(silent / "x"), target="/x"),))
        )
        async with asyncio.TaskGroup() as group:
            waiting = [group.create_task(_failure(one)) for one in (never.prepare(), made.start())]
            assert await output(executor, a_task("echo", "hello", slot=3)) == "hello\n"
        for one in waiting:
            assert "it does not respond within 1 s" in one.result()
        await made.remove()


@contextmanager
def mounted(target: Path, source: str, type: str | None, flags: int = 0) -> Iterator[None]:
    mount(source, target, type, flags)
    try:
        yield
    finally:
        unmount(target, MNT_DETACH)


def bound(source: Path, propagation: str) -> Mount:
    options = BindOptions(propagation=propagation)
    return Mount(type="bind", source=str(source), target="/data", bind_options=options)


def mounts_of(executor: OciExecutor, task: AssignedTask) -> dict[str, str]:
    """Where the task has mounts below /data, and of which type."""
    lines = Path(f"/proc/{executor.engine.get(task.name).pid}/mountinfo").read_text().splitlines()
    found = ((line.split()[4], line.partition(" - ")[2].split()[0]) for line in lines)
    return {target: type for target, type in found if target.startswith("/data/")}


async def test_mounts_that_are_made_later_reach_a_task_as_its_own_mount_says(
    tmp_path: Path, executor: OciExecutor
) -> None:
    source = tmp_path / "source"
    for name in ("later", "fuse", "inner"):
        (source / name).mkdir(parents=True)
    tasks = {
        one: a_task("sleep", "1000", slot=slot, mounts=(bound(source, one),)) for slot, one in enumerate(WAYS)
    }
    controllers = {one: executor.controller(task) for one, task in tasks.items()}
    with mounted(source, str(source), None, MS_BIND):
        mount("", source, None, MS_PRIVATE)
        for one, words in (("rshared", "shared"), ("rslave", "shared or slave")):
            refused = f"path {source} is mounted on {source} but it is not a {words} mount"
            assert refused in await _failure(controllers[one].prepare())
            await controllers[one].remove()
        mount("", source, None, MS_SHARED)
        for controller in controllers.values():
            await controller.prepare()
            await controller.start()
        (source / "fuse").rmdir()
        with mounted(source / "later", "tmpfs", "tmpfs"), silent_directory(source / "fuse"):
            (source / "later" / "file").write_text("later\n")
            for one, task in tasks.items():
                reached = {"/data/later": "tmpfs", "/data/fuse": "fuse"} if one != "rprivate" else {}
                assert mounts_of(executor, task) == reached, one
            pid = executor.engine.get(tasks["rslave"].name).pid
            assert Path(f"/proc/{pid}/root/data/later/file").read_text() == "later\n"
        for one in ("rslave", "rshared"):
            command = ("mount", "-t", "tmpfs", "tmpfs", "/data/inner")
            pid = executor.engine.get(tasks[one].name).pid
            entered = await asyncio.create_subprocess_exec("nsenter", f"--mount=/proc/{pid}/ns/mnt", *command)
            assert await entered.wait() == 0
            assert (str(source / "inner") in mount_targets()) == (one == "rshared")
        unmount(source / "inner", MNT_DETACH)
        for controller in controllers.values():
            await controller.terminate()
            await controller.wait()
            await controller.remove()


WAYS = ("rprivate", "rslave", "rshared")


async def test_no_volume_has_a_directory_with_the_nodes_sockets_as_a_layer(
    tmp_path: Path, executor: OciExecutor
) -> None:
    run = Path(executor.engine.volumes.refused_paths[0])
    (tmp_path / "link").symlink_to(run)
    one, other = tmp_path / "one", tmp_path / "an,other:one"
    for directory in (one, other):
        directory.mkdir()
    (other / "file").write_text("found")
    escaped = str(other).replace(",", "\\,").replace(":", "\\:")
    for number, layers in enumerate(
        (
            f"lowerdir={one}:{run}",
            f"lowerdir={tmp_path / 'link'}:{one}",
            f"lowerdir={run.parent}:{one}",
            f"lowerdir={one},upperdir={run},workdir={one}",
        )
    ):
        given = {"type": "overlay", "device": "overlay", "o": layers}
        controller = executor.controller(a_task("true", mounts=(with_options(f"layers{number}", given),)))
        await controller.prepare()
        with pytest.raises(SkepError, match="has sockets of this node"):
            await controller.start()
        await controller.remove()
    given = {"type": "overlay", "device": "overlay", "o": f"lowerdir={one}:{escaped}"}
    mount = with_options("layers", given)
    assert "found" in await output(executor, a_task("cat", f"{mount.target}/file", mounts=(mount,)))
    path = str(executor.engine.volumes.path("layers"))
    await eventually(lambda: path not in mount_targets(), "the volume is unmounted")


async def _failure(work: object) -> str:
    with pytest.raises(SkepError) as failed:
        await work  # type: ignore[misc]
    return str(failed.value)


@pytest.mark.parametrize("options", ["bind", "rbind", "bind,ro"])
async def test_no_volume_binds_a_directory_with_the_nodes_sockets(
    tmp_path: Path, executor: OciExecutor, options: str
) -> None:
    """A bind mount of it is covered by the container's own socket (``engine.api_sockets``), a volume could not be."""
    run = Path(executor.engine.volumes.refused_paths[0])
    (tmp_path / "link").symlink_to(run)
    for number, device in enumerate((run, run.parent, tmp_path / "link", "/")):
        if device == "/" and options != "rbind" and os.stat("/").st_dev != os.stat(run).st_dev:
            continue  # without the other file systems there is none of the node's sockets in it
        given = {"type": "none", "o": options, "device": str(device)}
        name = f"sockets{number}"
        controller = executor.controller(a_task("true", mounts=(with_options(name, given),)))
        await controller.prepare()
        with pytest.raises(SkepError, match="has sockets of this node: mount it as a bind, not as a volume"):
            await controller.start()
        assert str(executor.engine.volumes.path(name)) not in mount_targets()
        await controller.remove()
