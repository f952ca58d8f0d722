"""Containers whose users are mapped: their specification, mounts and refusals."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from skep.engine.capacity import Capacity
from skep.engine.confinement.devices import look_up
from skep.engine.confinement.machine import DeviceMapping, DeviceRequest, MachineOptions, check_mapped
from skep.engine.confinement.users import ProcessUser
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    MountPoint,
    PlainOptions,
    ProcessName,
)
from skep.engine.containers.shared_namespaces import shared_by
from skep.engine.runtime.bind_flags import request_flags
from skep.engine.runtime.mapped_mounts import has_own_owners, is_mapped, placed
from skep.engine.runtime.runtime_spec import NOTHING_SHARED, Shared, build
from skep.engine.volumes.tmpfs_mounts import owned_words
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.networks.sandbox import NetworkMode, Sandbox
from skep.model.values.ids import ContainerId
from skep.model.values.user_map import IdRange, UserMap
from tests.unit.engine.test_specification import ALL_CAPACITY

USERS = UserMap(uids=(IdRange(0, 100000, 65536),), gids=(IdRange(0, 200000, 65536),))


def a_container(letter: str = "c", users: UserMap | None = USERS, **config: Any) -> Container:
    return Container(
        id=ContainerId(letter * 64),
        name=letter,
        image="i",
        image_id="sha256:i",
        config=ContainerConfig(**{"path": "true", "seccomp": "unconfined", **config}),
        sandbox=Sandbox(netns="/n", userns="/u"),
        users=users,
    )


def specification(container: Container, shared: Shared = NOTHING_SHARED) -> dict[str, Any]:
    return build(
        container, ProcessUser(), ALL_CAPACITY, rootfs="/r", cgroup="/c", files=(), shared=shared
    ).specification


def namespaces(specification: dict[str, Any]) -> dict[str, str]:
    return {one["type"]: one.get("path", "") for one in specification["linux"]["namespaces"]}


def test_the_runtime_joins_the_user_namespace_that_owns_the_network() -> None:
    found = specification(a_container())
    assert namespaces(found)["user"] == "/u"
    assert found["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 100000, "size": 65536}]
    assert found["linux"]["gidMappings"] == [{"containerID": 0, "hostID": 200000, "size": 65536}]
    assert found["linux"]["sysctl"]["net.ipv4.ping_group_range"] == "0 65535"
    (cgroup,) = (one for one in found["mounts"] if one["type"] == "cgroup")
    assert "ro" not in cgroup["options"]


def test_a_runc_that_reads_the_mapping_of_a_namespace_is_not_told_it() -> None:
    """It would write a warning into the container's log."""
    capacity = replace(ALL_CAPACITY, runc_reads_mappings=True)

    def is_told(container: Container) -> bool:
        built = build(container, ProcessUser(), capacity, rootfs="/r", cgroup="/c", files=())
        return "uidMappings" in built.specification["linux"]

    assert not is_told(a_container())
    assert is_told(replace(a_container(), runtime="crun"))
    assert is_told(replace(a_container(), sandbox=None)), "it makes the namespace"


def test_a_container_of_the_machines_users_has_no_user_namespace() -> None:
    found = specification(a_container(users=None))
    assert "user" not in namespaces(found)
    assert "uidMappings" not in found["linux"]
    assert found["linux"]["sysctl"]["net.ipv4.ping_group_range"] == "0 2147483647"


def test_shared_namespaces_bring_their_user_namespace() -> None:
    shared = Shared(namespaces={"pid": "/proc/7/ns/pid", "user": "/proc/7/ns/user"})
    assert namespaces(specification(a_container(), shared))["user"] == "/proc/7/ns/user"


@pytest.mark.parametrize("mode", ["pid_mode", "ipc_mode"])
def test_only_containers_of_the_same_mapping_share_namespaces(mode: str) -> None:
    running = {"state": ContainerState.RUNNING, "process": ProcessName(7, 1, "b")}
    shareable = MachineOptions(ipc_mode="shareable")
    other = msgspec.structs.replace(a_container("o", machine=shareable), **running)
    options = MachineOptions(**{mode: "container:o"})
    asking = a_container(machine=options)
    shared = shared_by(asking, lambda _: other, lambda _: Path("/shm"))
    assert shared.namespaces["user"] == "/proc/7/ns/user"
    unmapped = msgspec.structs.replace(other, users=None)
    with pytest.raises(InvalidArgument, match="run both with --userns host, or both without it"):
        shared_by(asking, lambda _: unmapped, lambda _: Path("/shm"))
    on_the_machine = msgspec.structs.replace(asking, users=None)
    assert "user" not in shared_by(on_the_machine, lambda _: other, lambda _: Path("/shm")).namespaces


def test_what_needs_the_machines_root_is_refused_in_dockers_words() -> None:
    for options, network, words in (
        (
            {"privileged": True},
            "",
            (
                "privileged mode is incompatible with user namespaces.  "
                "You must run the container in the host namespace when running privileged mode"
            ),
        ),
        ({}, "host", "cannot share the host's network namespace when user namespaces are enabled"),
        ({"pid_mode": "host"}, "", "cannot share the host PID namespace when user namespaces are enabled"),
    ):
        with pytest.raises(InvalidArgument) as error:
            check_mapped(MachineOptions(**options), network, USERS)
        assert str(error.value) == words
        check_mapped(MachineOptions(**options, userns_mode="host"), network, USERS)
        check_mapped(MachineOptions(**options), network, None)
    check_mapped(MachineOptions(), "bridge", USERS)


def test_a_tmpfs_belongs_to_the_containers_user() -> None:
    assert owned_words(["size=1m"], USERS) == ["size=1m", "uid=100000", "gid=200000"]
    assert owned_words(["uid=5", "mode=700", "gid=6"], USERS) == ["mode=700", "uid=100005", "gid=200006"]


def test_volumes_and_the_nodes_own_directories_are_mapped_and_the_users_are_not() -> None:
    own = (Path("/data/csi"),)
    volume = MountPoint(type="volume", destination="/v", source="/data/volumes/v", read_only=True)
    bind = MountPoint(type="bind", destination="/b", source="/srv")
    cluster = MountPoint(type="bind", destination="/c", source="/data/csi/published/x")
    secret = MountPoint(type="bind", destination="/s", source="/run/skep/secrets/0", internal=True)
    memory = MountPoint(type="tmpfs", destination="/t")
    container = a_container(mounts=(volume, bind, cluster, secret, memory))
    points = container.config.mounts
    assert [is_mapped(container, one, own) for one in points] == [True, False, True, False, False]
    step = msgspec.structs.replace(container, plain=PlainOptions(mode=NetworkMode.NONE, is_step=True))
    assert [is_mapped(step, one, own) for one in points] == [True, True, True, False, False]
    unmapped = msgspec.structs.replace(container, users=None)
    assert not any(is_mapped(unmapped, one, own) for one in points)
    shown = placed(container, points, Path("/run/b/mapped"), own)
    assert [one.source for one in shown] == ["/run/b/mapped/0", "/srv", "/run/b/mapped/2", secret.source, ""]
    assert not shown[0].read_only  # the view is
    assert has_own_owners(volume, lambda path: path == Path("/data/volumes/v"))
    assert not has_own_owners(volume, lambda _: False)
    assert not has_own_owners(cluster, lambda _: True)
    for elsewhere in (
        "/data/csi/../../etc",
        "/data/csi/published/x/link",
        "/data/csi",
        "/data/csi/published",
    ):
        outside = msgspec.structs.replace(cluster, source=elsewhere)
        assert not is_mapped(container, outside, own), elsewhere


def test_a_read_only_mount_requests_the_flags_of_its_source() -> None:
    mount = {"type": "bind", "source": "/x", "options": ["rbind", "ro"]}
    request_flags([mount, {"type": "proc"}], lambda _: 2 | 4)
    assert mount["options"] == ["rbind", "ro", "nosuid", "nodev"]


@pytest.mark.parametrize(
    ("users", "capacity"),
    [(USERS, ALL_CAPACITY), (None, msgspec.structs.replace(ALL_CAPACITY, is_in_user_namespace=True))],
)
def test_a_device_under_another_name_is_a_mount_in_a_user_namespace(
    users: UserMap | None, capacity: Capacity
) -> None:
    container = a_container(users=users)
    zero = DeviceMapping(path_on_host="/dev/zero", path_in_container="/dev/sensor", cgroup_permissions="r")
    same = DeviceMapping(path_on_host="/dev/null")
    devices = look_up(MachineOptions(devices=(zero, same)), ())
    found = build(
        container, ProcessUser(), capacity, rootfs="/r", cgroup="/c", files=(), devices=devices
    ).specification
    assert [one["path"] for one in found["linux"]["devices"]] == ["/dev/null"]
    (mount,) = [one for one in found["mounts"] if one["destination"] == "/dev/sensor"]
    assert (mount["type"], mount["source"], mount["options"]) == ("bind", "/dev/zero", ["rbind", "rprivate"])
    rule = {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "r"}
    assert rule in found["linux"]["resources"]["devices"]


def test_a_described_device_that_has_no_file_with_its_numbers_is_refused_with_mapped_users(
    tmp_path: Path,
) -> None:
    (tmp_path / "acme.yaml").write_text(
        "cdiVersion: 0.5.0\nkind: acme.com/chip\ndevices:\n- name: zero\n  containerEdits:\n    deviceNodes:\n"
        "    - {path: /dev/chip, hostPath: /dev/zero}\n"
        "- name: other\n  containerEdits:\n    deviceNodes:\n"
        "    - {path: /dev/chip, hostPath: /dev/zero, type: c, major: 1, minor: 9}\n"
    )

    def made(name: str) -> dict[str, Any]:
        request = DeviceRequest(driver="cdi", device_ids=(f"acme.com/chip={name}",))
        devices = look_up(MachineOptions(device_requests=(request,)), (tmp_path,))
        return build(
            a_container(), ProcessUser(), ALL_CAPACITY, rootfs="/r", cgroup="/c", files=(), devices=devices
        ).specification

    assert ("/dev/chip", "/dev/zero") in [
        (one["destination"], one["source"]) for one in made("zero")["mounts"]
    ]
    with pytest.raises(FailedPrecondition, match="/dev/chip with the numbers 1:9"):
        made("other")
