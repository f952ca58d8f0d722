"""Files and networks of containers with mapped users, on the real kernel."""

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skep.agent.executor.payloads import Payloads
from skep.dataplane.door.certificates import LIST
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.engine.containers.container import MountPoint
from skep.engine.runtime import mapped_mounts
from skep.engine.runtime.conmon import pipe_owner
from skep.engine.runtime.overlay import mount_layers
from skep.engine.volumes.mounts import copy_up
from skep.errors import Unavailable
from skep.linux import syscalls
from skep.linux.confined_root import Bind, enter
from skep.linux.user_namespaces import enter as enter_users
from skep.linux.user_namespaces import mapped_mount, mapping, mapping_problem
from skep.model.values.user_map import IdRange, UserMap
from tests.support.storage.file_servers import silent_directory
from tests.unit.engine.test_mapped_users import a_container

pytestmark = pytest.mark.needs("root")

FIRST = 700_000
USERS = UserMap(uids=(IdRange(0, FIRST, 65536),), gids=(IdRange(0, FIRST, 65536),))
_NS_GET_USERNS = 0xB701


def as_containers_root(root: Path, act: Callable[[], None]) -> None:
    """Run ``act`` in a process with the container's users, which works in the directory ``root``."""
    namespace = mapping(USERS.kernel_text)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(root)  # other users cannot pass the directories of tests
            enter_users(namespace)
            act()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


@contextmanager
def mounted(place: Path, layers: int = 1) -> Iterator[Path]:
    """Mount an overlay with mapped users.  Each layer has a file of its number, owned by the user of that number."""
    lower = []
    for number in range(layers):
        layer = place / "layers" / f"{number:064}"
        layer.mkdir(parents=True)
        (layer / str(number)).touch()
        os.chown(layer / str(number), number, number)
        lower.append(layer)
    for name in ("own/upper", "own/work", "root"):
        (place / name).mkdir(parents=True)
    mount_layers(lower, place / "own" / "upper", place / "own" / "work", place / "root", USERS)
    try:
        yield place / "root"
    finally:
        syscalls.unmount_if_mounted(place / "root")


def test_the_disk_has_the_containers_ids_and_the_container_its_own_users(tmp_path: Path) -> None:
    with mounted(tmp_path, layers=3) as root:
        assert [owner(root / str(number))[0] for number in range(3)] == [FIRST, FIRST + 1, FIRST + 2]

        def change() -> None:
            Path("new").touch()
            os.chown("2", 33, 34)  # copies it up
            Path("1").unlink()

        as_containers_root(root, change)
        assert owner(root / "new") == (FIRST, FIRST)
    upper = tmp_path / "own" / "upper"
    assert owner(upper / "new") == (0, 0)
    assert owner(upper / "2") == (33, 34)
    assert (upper / "1").is_char_device()
    assert list(tmp_path.glob("root.views/*/*")) == []


def test_an_image_of_many_layers_is_mounted(tmp_path: Path) -> None:
    with mounted(tmp_path, layers=100) as root:
        assert owner(root / "99") == (FIRST + 99, FIRST + 99)


def test_the_machines_users_own_nothing_in_the_container(tmp_path: Path) -> None:
    with mounted(tmp_path) as root:
        (tmp_path / "layers" / f"{0:064}" / "foreign").touch()
        os.chown(tmp_path / "layers" / f"{0:064}" / "foreign", FIRST, FIRST)  # no user of the container
        nobody = owner(root / "foreign")
        assert nobody == (65534, 65534)


async def test_a_new_volume_has_the_images_owners_on_the_disk(tmp_path: Path) -> None:
    with mounted(tmp_path) as root:

        def prepare() -> None:
            Path("data").mkdir()
            Path("data/file").touch()
            os.chown("data/file", 7, 8)
            os.chown("data", 5, 6)

        as_containers_root(root, prepare)
        volume = tmp_path / "volume"
        volume.mkdir()
        await copy_up(root, "/data", volume, users=USERS)
        assert owner(volume) == (5, 6)
        assert owner(volume / "file") == (7, 8)


async def test_a_network_belongs_to_the_containers_root(tmp_path: Path) -> None:
    namespaces = Namespaces(tmp_path / "netns")
    try:
        path = await namespaces.create("one", {"net/ipv4/ip_forward": "1"}, USERS)
        network = os.open(path, os.O_RDONLY)
        try:
            users = fcntl.ioctl(network, _NS_GET_USERNS)
            assert os.fstat(users).st_ino == namespaces.users_path("one").stat().st_ino
            os.close(users)
        finally:
            os.close(network)
        joined = await namespaces.create("two", {}, USERS, str(namespaces.users_path("one")))
        assert namespaces.users_path("two").stat().st_ino == namespaces.users_path("one").stat().st_ino
        assert joined.stat().st_ino != path.stat().st_ino
        plain = await namespaces.create("three", {})
        assert not namespaces.users_path("three").exists()
        assert plain.exists()
    finally:
        for id in namespaces.pinned():
            await namespaces.destroy(id)
        namespaces.close()
    assert list((tmp_path / "userns").iterdir()) == []


def test_a_file_worker_sees_the_containers_ids_in_its_root_and_its_volumes(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "file").touch()
    os.chown(volume / "file", 9, 9)
    with mounted(tmp_path, layers=6) as root:
        namespace = mapping(USERS.kernel_text)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                enter(str(root), [Bind(str(volume), "/made/v", is_mapped=True)], namespace=namespace)
                seen = [
                    os.getuid(),
                    os.stat("/5").st_uid,
                    os.stat("/made").st_uid,
                    os.stat("/made/v/file").st_uid,
                ]
                os.close(os.open("/made/v/new", os.O_CREAT | os.O_WRONLY))
                status = 0 if seen == [0, 5, 0, 9] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert owner(volume / "new") == (0, 0)
    assert owner(tmp_path / "own" / "upper" / "made") == (0, 0)


def test_volumes_are_mapped_and_what_they_mount_is_not(tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    points = []
    for name in ("plain", "bound"):
        (tmp_path / name).mkdir()
        points.append(
            MountPoint(type="volume", destination=f"/{name}", source=str(tmp_path / name), read_only=True)
        )
    syscalls.mount(str(tmp_path / "machine"), tmp_path / "bound", None, syscalls.MS_BIND)
    container = a_container(users=USERS, mounts=tuple(points))
    views = tmp_path / "views"
    try:
        mapped_mounts.mount_all(container, points, views, ())
        assert owner(views / "0") == (FIRST, FIRST)
        assert owner(views / "1") == (0, 0)
        for number in "01":
            with pytest.raises(OSError, match="Read-only"):
                (views / number / "new").touch()
    finally:
        mapped_mounts.unmount_all(views)
        syscalls.unmount_if_mounted(tmp_path / "bound")
    assert owner(views / "0") == (0, 0)


def test_a_file_system_without_mapped_owners_is_found(tmp_path: Path) -> None:
    assert mapping_problem(tmp_path / "new") == ""
    assert list((tmp_path / "new").iterdir()) == []
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700, "files of containers' roots lie there"
    with pytest.raises(OSError, match="Invalid argument"):
        mapped_mount("/proc", mapping(USERS.kernel_text))


def test_the_owner_of_the_pipes_is_the_containers_root(tmp_path: Path) -> None:
    program = pipe_owner(tmp_path, USERS.root)
    script = "import os; print([os.fstat(n).st_uid for n in (0, 1)], os.fstat(2).st_uid)"
    done = subprocess.run(
        [program, sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"[{os.stat('/dev/null').st_uid}, {FIRST}] {FIRST}\n"


def test_certificates_belong_to_the_root_that_each_container_of_the_front_door_began_with(
    tmp_path: Path,
) -> None:
    def process(users: UserMap | None) -> Payloads:
        payloads = Payloads(tmp_path, mount_ramfs=lambda _: None, users=users)
        payloads.open()
        return payloads

    mapped, unmapped = (tmp_path / "files" / name / "door" for name in ("mapped", "unmapped"))
    process(USERS).materialize_door("mapped")
    process(None).materialize_door("unmapped")
    for users in (USERS, None):
        (mapped / LIST).unlink()  # so that it is written again, as after a renewal
        (unmapped / LIST).unlink()
        process(users).write_door()
        assert [owner(one) for one in (mapped, mapped / LIST)] == [(FIRST, FIRST)] * 2
        assert [owner(one) for one in (unmapped, unmapped / LIST)] == [(0, 0)] * 2


async def test_a_volume_whose_server_is_silent_fails_its_start_within_a_limit(tmp_path: Path) -> None:
    mounts = mapped_mounts.ViewMounts()
    mounts.deadline_s = 0.1
    views = tmp_path / "views"
    with silent_directory(tmp_path / "silent") as silent:
        point = MountPoint(type="volume", destination="/v", source=str(silent))
        container = a_container(users=USERS, mounts=(point,))
        with pytest.raises(Unavailable, match="look after its file server"):
            await mounts.mount(
                "c", lambda is_over: mapped_mounts.mount_all(container, [point], views, (), is_over)
            )
        waiting = [one for one in threading.enumerate() if one.name == "blocking call"]
        assert len(waiting) == 1
    waiting[0].join(10)  # the server has ended
    assert not views.exists(), "nobody waits for the view any more"


def test_a_view_is_not_mounted_after_its_start_has_ended(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    point = MountPoint(type="volume", destination="/v", source=str(tmp_path / "volume"))
    container = a_container(users=USERS, mounts=(point,))
    mapped_mounts.mount_all(container, [point], tmp_path / "views", (), lambda: True)
    assert not (tmp_path / "views").exists()
    mapped_mounts.mount_all(container, [point], tmp_path / "views", ())
    assert owner(tmp_path / "views" / "0") == (FIRST, FIRST)
    mapped_mounts.unmount_all(tmp_path / "views")


def test_what_is_mounted_in_a_volume_is_in_its_view_and_outlives_it(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    syscalls.mount("tmpfs", tree, "tmpfs")
    syscalls.mount("none", tree, None, syscalls.MS_SHARED)  # as systemd mounts everything
    for name in ("volume", "own"):
        (tree / name / "below").mkdir(parents=True)
    try:
        for name in ("volume", "own"):
            if name == "own":
                syscalls.mount(str(tree / "own"), tree / "own", None, syscalls.MS_BIND)
            below = tree / name / "below"
            syscalls.mount("tmpfs", below, "tmpfs")
            (below / "file").touch()
            point = MountPoint(type="volume", destination="/v", source=str(tree / name))
            container = a_container(users=USERS, mounts=(point,))
            views = tmp_path / f"views-{name}"
            mapped_mounts.mount_all(container, [point], views, ())
            assert owner(views / "0" / "below" / "file") == (0, 0)
            mapped_mounts.unmount_all(views)
            assert (below / "file").exists()
    finally:
        syscalls.unmount_if_mounted(tree)
