"""Mounts of containers, and the volumes made for them."""

from pathlib import Path

import msgspec
import pytest

from skep.engine.volumes.mounts import check_local_options, check_subpath, mount_point
from skep.engine.volumes.volume_store import ANONYMOUS
from skep.engine.volumes.volumes import Volumes
from skep.errors import InvalidArgument, PermissionDenied, SkepError, Unavailable
from skep.linux import mounting, syscalls
from skep.model.container import Mount, TmpfsOptions, VolumeOptions
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL


def test_a_volume_is_made_with_the_labels_of_its_mount(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    mount = Mount(type="volume", source="data", target="/v", volume_options=VolumeOptions(labels={"a": "b"}))
    volumes.mount_points([mount], ())
    assert volumes.labels("data") == {"a": "b"}
    (nameless,) = volumes.mount_points([msgspec.structs.replace(mount, source="")], ())
    assert volumes.labels(nameless.name) == {"a": "b", ANONYMOUS: ""}


def of(source: str, **labels: str) -> Mount:
    return Mount(type="volume", source=source, target="/v", volume_options=VolumeOptions(labels=labels))


def test_a_volume_of_a_service_has_its_stack_whatever_the_mount_says(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    volumes.mount_points([of("shop_data", a="b", **{STACK_LABEL: "blog"})], (), "shop")
    assert volumes.labels("shop_data") == {"a": "b", STACK_LABEL: "shop"}
    (nameless,) = volumes.mount_points([Mount(type="volume", target="/v")], (), "shop")
    assert volumes.labels(nameless.name) == {ANONYMOUS: ""}
    volumes.mount_points([of("plain")], ())
    assert volumes.labels("plain") is None


def test_a_stack_gets_no_volume_of_another_stack_that_an_operator_could_name(tmp_path: Path) -> None:
    """The stack shop_eu is down, and only its volume is left."""
    volumes = Volumes(tmp_path)
    volumes.mount_points([of("shop_eu_data")], (), "shop_eu")
    refused = "volume shop_eu_data belongs to the stack shop_eu: services of the stack shop cannot use it"
    with pytest.raises(PermissionDenied, match=refused):
        volumes.mount_points([of("shop_eu_data")], (), "shop")
    assert volumes.labels("shop_eu_data") == {STACK_LABEL: "shop_eu"}
    volumes.mount_points([of("shop_eu_data")], (), "shop_eu")
    # Nor does it find what another stack has put there for it.
    volumes.mount_points([of("shop_us_data")], (), "shop")
    with pytest.raises(PermissionDenied, match="volume shop_us_data belongs to the stack shop:"):
        volumes.mount_points([of("shop_us_data")], (), "shop_us")
    # Only an administrator can name these: a volume of another stack, one of no stack, a container of no stack.
    volumes.mount_points([of("shop_eu_data")], (), "blog")
    volumes.ensure("shop_shared")
    volumes.mount_points([of("shop_shared")], (), "shop")
    volumes.mount_points([of("shop_eu_data")], ())


async def test_a_stack_gets_no_volume_of_another_stack_from_a_plugin(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    volumes.ensure("shop_eu_data", {STACK_LABEL: "shop_eu"}, driver="nas")
    mount = Mount(
        type="volume",
        source="shop_eu_data",
        target="/v",
        volume_options=VolumeOptions(driver_config=Driver(name="nas")),
    )
    with pytest.raises(PermissionDenied, match="belongs to the stack shop_eu"):
        await volumes.create_of_plugins([mount], "shop")


def test_a_volume_that_the_file_system_refuses_is_refused_in_dockers_words(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    with pytest.raises(SkepError) as error:
        volumes.ensure("a" * 300)
    path = tmp_path / ("a" * 300) / "_data"
    assert str(error.value) == f"error while creating volume path '{path}': File name too long"
    assert volumes.names() == []


def test_tmpfs_options_replace_their_opposites() -> None:
    mount = Mount(type="tmpfs", target="/t", tmpfs_options=TmpfsOptions(options=(("exec",), ("uid", "7"))))
    assert mount_point(mount, "", "").options == ("nosuid", "nodev", "rprivate", "exec", "uid=7")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("nonsense",), r'invalid tmpfs option \["nonsense"\]'),
        (("size",), r'invalid tmpfs option \["size"\]'),
        (("noexec", "1"), r'invalid tmpfs option \["noexec" "1"\]'),
        (("bind",), "invalid tmpfs option"),  # these would mount something else
        (("remount",), "invalid tmpfs option"),
    ],
)
def test_options_that_no_tmpfs_has_are_refused_in_dockers_words(option: tuple[str, ...], said: str) -> None:
    mount = Mount(type="tmpfs", target="/t", tmpfs_options=TmpfsOptions(options=(option,)))
    with pytest.raises(InvalidArgument, match=said):
        mount_point(mount, "", "")


def with_options(**options: str) -> Mount:
    given = VolumeOptions(driver_config=Driver(name="local", options=options))
    return Mount(type="volume", source="data", target="/v", volume_options=given)


def test_a_mount_with_other_options_than_its_volume_has_is_refused(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    mount = with_options(type="nfs", device=":/a", o="addr=10.0.0.1,password=x")
    volumes.mount_points([mount], ())
    assert volumes.options("data") == {"type": "nfs", "device": ":/a", "o": "addr=10.0.0.1,password=x"}
    assert (tmp_path / "data" / "options.json").stat().st_mode & 0o077 == 0, "there may be a password in it"
    volumes.mount_points([mount, Mount(type="volume", source="data", target="/v")], ())
    with pytest.raises(InvalidArgument, match="volume data exists with other options"):
        volumes.mount_points([with_options(type="nfs", device=":/b", o="addr=10.0.0.1")], ())


async def test_a_volume_that_stays_mounted_keeps_no_other_one(tmp_path: Path) -> None:
    requests = tmp_path / "requests"
    command = ("sh", "-c", f'cat >>{requests}; echo busy >&2; ! grep -q "/a[0-9]*/_data" {requests}')
    volumes = Volumes(tmp_path / "volumes", command=command, is_mount_point=lambda _: True)
    points = [
        mount_point(Mount(type="volume", target=f"/{name}"), str(volumes.ensure(name)), name)
        for name in ("a1", "b1", "a2")
    ]
    volumes.adopt("c", points)
    with pytest.raises(Unavailable, match="cannot unmount volume a1: busy"):
        await volumes.unmount("c")
    assert [one in requests.read_text() for one in ("/a1/", "/b1/", "/a2/")] == [True, True, True]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bogus": "1"}, 'invalid option: "bogus"'),
        ({"type": "nfs"}, 'missing required option: "device"'),
        ({"o": "ro", "device": "/x"}, 'missing required option: "type"'),
        ({"size": "1g"}, "quota size requested but no quota support"),
        ({"size": "much"}, "invalid size: 'much'"),
        ({"type": "cifs", "device": "//server:44/share"}, "port not allowed in CIFS device URL"),
        ({"type": "cifs", "device": "//server:x/share"}, "error parsing mount device url"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_local_options("v1", options)
    assert str(refused.value).startswith(f"create v1: {text}")


@pytest.mark.parametrize("part", ["../x", "a/../../x", "/x", "a/../..", "a\0b"])
def test_a_part_that_is_not_within_its_volume_is_refused(part: str) -> None:
    with pytest.raises(InvalidArgument, match="subpath must be a relative path within the volume"):
        check_subpath("volume", part)
    check_subpath("volume", "a/../b")


def test_a_volume_without_a_name_has_no_parts(tmp_path: Path) -> None:
    mount = Mount(type="volume", target="/v", volume_options=VolumeOptions(subpath="a"))
    with pytest.raises(InvalidArgument, match="must not set Subpath when using anonymous volumes"):
        Volumes(tmp_path).mount_points([mount], ())


def test_mount_options_are_flags_or_data_of_the_file_system() -> None:
    flags, data = mounting.parse_options("rw,bind,noexec,exec,ro,addr=1.2.3.4,,vers=4.2")
    assert flags == syscalls.MS_BIND | syscalls.MS_RDONLY
    assert data == "addr=1.2.3.4,vers=4.2"


@pytest.mark.parametrize(
    ("kind", "device", "options", "resolved"),
    [
        ("nfs", ":/x", "addr=localhost,ro", (":/x", "addr=127.0.0.1,ro")),
        ("nfs", ":/x", "addr=10.0.0.1", (":/x", "addr=10.0.0.1")),
        ("cifs", "//localhost/share", "ro", ("//127.0.0.1/share", "ro")),
        ("cifs", "//10.0.0.1/share", "", ("//10.0.0.1/share", "")),
    ],
)
def test_the_kernel_gets_an_address_for_a_servers_name(
    kind: str, device: str, options: str, resolved: tuple[str, str]
) -> None:
    assert mounting.resolved(kind, device, options) == resolved


def test_a_servers_name_without_an_address_is_named() -> None:
    with pytest.raises(mounting.KernelMountFailed, match=r"lookup nosuch\.invalid: no such host"):
        mounting.resolved("nfs", ":/x", "addr=nosuch.invalid")


async def test_a_volume_keeps_what_has_used_it_until_it_is_removed(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    for name in ("data", "bad"):
        volumes.ensure(name)
        await volumes.note_use(name, "web.1", 5)
    await volumes.note_use("data", "web.2", 7)
    await volumes.note_use("data", "web.1", 3)  # of an earlier task, whose container is made late
    volumes.ensure("far", None, {"type": "nfs", "device": ":/x", "o": "addr=10.0.0.1"})
    await volumes.note_use("far", "web.1", 5)
    (tmp_path / "bad" / "uses.json").write_text("{")
    again = Volumes(tmp_path)
    again.open()
    assert again.uses == {"data": {"web.1": 5, "web.2": 7}}
    await again.remove("data", list)
    assert again.uses == {}
    with pytest.raises(Unavailable, match="use of volume data not kept"):
        await again.note_use("data", "web.1", 9)


async def test_a_volume_keeps_the_latest_of_many_uses(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    volumes.ensure("data")
    for number in range(80):
        await volumes.note_use("data", f"web.{number}", number)
    assert sorted(volumes.uses["data"].values()) == list(range(16, 80))
