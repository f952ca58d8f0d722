"""What a plain process sees of its machine."""

from pathlib import Path
from typing import Any

import pytest

from skep.engine.containers.container import Container, ContainerConfig, ExecConfig, MountPoint
from skep.engine.runtime import machine_files
from skep.errors import FailedPrecondition, InvalidArgument
from skep.linux.confined_root import Bind
from skep.model.values.ids import ContainerId
from skep.model.values.user_map import IdRange, UserMap

PROCESS = ContainerConfig(path="true", is_process=True)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine whose programs are in /usr, as on Debian, except those in /sbin."""
    root = tmp_path / "machine"
    for name in ("usr/bin", "etc", "sbin", "srv", "var", "run", "home"):
        (root / name).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "etc/hosts").touch()
    (root / "etc/resolv.conf").symlink_to("../run/nosuch")
    (root / "etc/passwd").write_text("root:x:0:0::/:\nalice:x:7:8::/:\nbob:x:9:0::/:\n")
    (root / "etc/group").write_text("root:x:0:\nstaff:x:5:alice\nwheel:x:0:carol\n")
    return root


def files(*names: str) -> list[MountPoint]:
    return [MountPoint(type="bind", source="x", destination=f"/etc/{name}", internal=True) for name in names]


def test_its_root_directory_has_places_for_the_machines_directories(machine: Path, tmp_path: Path) -> None:
    machine_files.make_root(tmp_path / "root", machine)
    root = tmp_path / "root"
    assert {"usr", "etc", "sbin", "tmp", "run", "home"} < {one.name for one in root.iterdir()}
    assert (root / "bin").readlink() == Path("usr/bin")
    assert not (root / "opt").exists()
    assert (root / "tmp").stat().st_mode & 0o7777 == (root / "var/tmp").stat().st_mode & 0o7777 == 0o1777


def test_directories_of_programs_are_mounted_before_the_nodes_files(machine: Path) -> None:
    given = files("hosts", "hostname", "resolv.conf")
    *directories, first, second = machine_files.added(PROCESS, given, machine)
    assert [one.destination for one in directories] == ["/etc", "/sbin", "/usr"]
    assert all(one.read_only and one.read_only_below for one in directories)
    assert {one.options for one in directories} == {("nosuid", "nodev")}
    assert (first, second) == (given[0], given[2]), "/etc/hostname cannot be created"
    assert machine_files.added(ContainerConfig(path="true"), given, machine) is given


def test_keys_and_the_nodes_own_directories_are_masked() -> None:
    specification: dict[str, Any] = {"linux": {"maskedPaths": ["/proc/kcore"]}}
    machine_files.hide(specification, (Path("/opt/skep"), Path("/run/skep")))
    masked = specification["linux"]["maskedPaths"]
    assert {"/proc/kcore", "/etc/shadow", "/etc/skep", "/opt/skep"} <= set(masked)
    assert "/run/skep" not in masked, "nothing of /run is visible"


def test_copies_see_empty_directories_in_place_of_the_machines(machine: Path) -> None:
    data, below = Bind("/data", "/srv/data"), Bind("/data", "/usr/data")
    binds = {one.target: one for one in (data, below)}
    found = machine_files.closed(binds, Path("/c/root"), machine)
    assert found == {
        "/srv/data": data,
        **{f"/{name}": Bind(f"/c/root/{name}", f"/{name}", True) for name in ("usr", "etc", "sbin")},
    }


@pytest.mark.parametrize(
    ("user", "groups", "expected"),
    [
        ("alice", (), (7, 8)),
        ("7", (), (7, 8)),
        ("alice:staff", (), (7, 5)),
        ("65534:65534", (), (65534, 65534)),
    ],
)
def test_the_user_is_one_of_the_machine(
    machine: Path, user: str, groups: tuple[str, ...], expected: tuple[int, int]
) -> None:
    found = machine_files.identity_of(user, groups, machine)
    assert (found.uid, found.gid) == expected


@pytest.mark.parametrize(
    ("user", "groups"),
    [
        ("root", ()),
        ("", ()),
        ("0:5", ()),
        ("alice:root", ()),
        ("bob", ()),
        ("1234", ()),
        ("alice", ("wheel",)),
    ],
)
def test_nobody_becomes_root_by_another_name(machine: Path, user: str, groups: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument, match="a plain process cannot run as the user or group root"):
        machine_files.identity_of(user, groups, machine)


def test_a_command_in_it_is_never_privileged() -> None:
    machine_files.check_exec(ExecConfig(command=("id",)))
    with pytest.raises(InvalidArgument, match="no privileged commands"):
        machine_files.check_exec(ExecConfig(command=("id",), privileged=True))


def a_container(*targets: str, users: UserMap | None = None) -> Container:
    points = tuple(MountPoint(type="bind", source="/data", destination=one) for one in targets)
    config = ContainerConfig(path="true", is_process=True, mounts=points)
    return Container(id=ContainerId("c"), name="c", image="scratch", image_id="", config=config, users=users)


def test_mount_targets_exist_or_can_be_created(machine: Path) -> None:
    targets = ("/srv/a/b", "/data", "/etc/hosts", "/usr", "/usr/new", "/opt2")
    machine_files.check(a_container(*targets), is_in_user_namespace=False, machine=machine)
    for target in ("/etc/app/x", "//etc/app", "/usr/../etc/app", "/opt", "/bin/new"):
        with pytest.raises(FailedPrecondition, match="does not exist on this machine"):
            machine_files.check(a_container(target), is_in_user_namespace=False, machine=machine)


@pytest.mark.needs("root")
def test_mount_points_of_volumes_stay_in_its_root_directory(machine: Path, tmp_path: Path) -> None:
    (machine / "lib64").symlink_to(machine / "usr")
    root = tmp_path / "root"
    machine_files.make_root(root, machine)
    points = tuple(
        MountPoint(type=kind, source="/v", destination=target)
        for kind, target in (
            ("volume", "/data/a"),
            ("volume", "//lib64/b"),
            ("volume", "/var/run/../lib/c"),
            ("volume", "/etc/d"),
            ("bind", "/e"),
        )
    )
    config = ContainerConfig(path="true", is_process=True, user="alice", mounts=points)
    machine_files.own_volumes(config, root, machine)
    owned = {str(one.relative_to(root)) for one in root.rglob("*") if one.lstat().st_uid == 7}
    assert owned == {"data/a", "var/lib/c"}
    assert (root / "data/a").stat().st_gid == 8
    assert not (machine / "usr/b").exists()


def test_nodes_with_other_users_run_no_processes(machine: Path) -> None:
    ranges = (IdRange(0, 100_000, 65_536),)
    mapped = a_container(users=UserMap(uids=ranges, gids=ranges))
    with pytest.raises(FailedPrecondition, match="one with mapped users"):
        machine_files.check(mapped, is_in_user_namespace=False, machine=machine)
    with pytest.raises(FailedPrecondition, match="this node is rootless"):
        machine_files.check(a_container(), is_in_user_namespace=True, machine=machine)
