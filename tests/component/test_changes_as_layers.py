"""A directory of changes becomes a layer, and layers an image, by the confined workers on real overlays."""

import asyncio
import io
import os
import socket
import stat
import struct
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from skep.engine.images.archives.workers import ImageLimits, UnpackFailed
from skep.engine.images.child import EMPTY_LAYER, HistoryStep, child_config
from skep.engine.images.digest import chain_ids
from skep.engine.images.image import Image
from skep.engine.images.layers import Layer
from skep.engine.images.reference import parse_reference
from skep.engine.images.store import ImageStore
from skep.engine.runtime.overlay import mount_layers
from skep.errors import InvalidArgument, ResourceExhausted, SkepError
from skep.linux.syscalls import unmount_if_mounted

_NOW = "2026-01-02T03:04:05Z"


@pytest.fixture
async def images(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images")
    await store.open()
    return store


def a_directory(place: Path, **files: str) -> Path:
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_text(content)
    return place


@contextmanager
def mounted(layers: list[Path], place: Path) -> Iterator[tuple[Path, Path]]:
    """An overlay of ``layers``, top first.  Gives where it is mounted, and its upper directory."""
    upper, work, target = place / "upper", place / "work", place / "rootfs"
    for directory in (upper, work, target):
        directory.mkdir(parents=True)
    mount_layers(layers, upper, work, target)
    try:
        yield target, upper
    finally:
        unmount_if_mounted(target)


async def an_image(images: ImageStore, changes: Path, parent: Image | None = None, *names: str) -> Image:
    async with images.layer_of_changes(changes, parent) as layer:
        return await added(images, layer, parent, *names)


async def added(images: ImageStore, layer: Layer, parent: Image | None, *names: str) -> Image:
    content = images.config_file(parent).read_bytes() if parent is not None else None
    step = HistoryStep(created=_NOW, diff_id=layer.diff_id, created_by="a test")
    made = child_config(content, step, {"Cmd": ["sh"]}, platform={"os": "linux", "architecture": "amd64"})
    return await images.add(made, [parse_reference(name) for name in names])


def members_of(images: ImageStore, layer: Layer) -> dict[str, tarfile.TarInfo]:
    compressed = images.layer_store.content(layer.chain_id).read_bytes()
    plain = zstandard.ZstdDecompressor().stream_reader(compressed, read_across_frames=True).read()
    with tarfile.open(fileobj=io.BytesIO(plain), encoding="utf-8", errors="surrogateescape") as archive:
        return {member.name: member for member in archive}


def shown(tree: Path) -> dict[str, tuple[int, int, int]]:
    """What a container would see: path -> kind and mode, owner, size of files and links."""
    found = {}
    for path in tree.rglob("*"):
        status = path.lstat()
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[str(path.relative_to(tree))] = (status.st_mode, status.st_uid, size)
    return found


@pytest.mark.parametrize("take", [False, True], ids=["copied", "moved"])
async def test_an_image_of_changes_has_the_files_that_the_overlay_showed(
    tmp_path: Path, images: ImageStore, take: bool
) -> None:
    first = a_directory(tmp_path / "first", kept="kept", changed="before", gone="gone")
    for name in ("replaced", "emptied"):
        a_directory(first / name, old="old")
    base = await an_image(images, first, None, "base:1")
    with mounted(list(images.layers(base)), tmp_path / "one") as (tree, upper):
        (tree / "changed").write_text("after")
        (tree / "changed").chmod(0o4755)
        (tree / "gone").unlink()
        (tree / "emptied" / "old").unlink()
        (tree / "replaced" / "old").unlink()
        (tree / "replaced").rmdir()
        a_directory(tree / "replaced", new="new")  # opaque
        os.symlink("/etc/passwd", tree / "link")
        os.chown(tree / "link", 5, 6, follow_symlinks=False)
        before = shown(tree)
    async with images.layer_of_changes(upper, base, take=take) as layer:
        child = await added(images, layer, base, "child:1")
    assert upper.exists() is not take
    with mounted(list(images.layers(child)), tmp_path / "two") as (tree, _):
        assert shown(tree) == before
        assert (tree / "changed").read_text() == "after"
    assert {".wh.gone", "replaced/.wh..wh..opq", "emptied/.wh.old"} <= set(members_of(images, layer))
    assert layer.size_bytes == len("after") + len("new") + len("/etc/passwd")
    assert images.get("child:1").chain == chain_ids([*base.config.diff_ids, layer.diff_id])


async def test_changes_have_one_digest_whether_they_are_copied_or_moved(
    tmp_path: Path, images: ImageStore
) -> None:
    changes = a_directory(tmp_path / "changes", b="b", a="a")
    async with (
        images.layer_of_changes(changes, None) as copied,
        images.layer_of_changes(changes, None, take=True) as moved,
    ):
        assert moved == copied
    assert images.layer_store.get(copied.chain_id) is None, "no image has it"


async def test_unusual_files_are_in_the_layer(tmp_path: Path, images: ImageStore) -> None:
    changes = a_directory(tmp_path / "changes", one="content")
    os.link(changes / "one", changes / "two")
    os.setxattr(changes / "one", "user.note", b"\xff\x00kept")
    capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep
    os.setxattr(changes / "one", "security.capability", capability)
    os.mkfifo(changes / "pipe")
    os.mknod(changes / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(changes / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 0))
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(changes / "socket"))
    with (changes / "sparse").open("wb") as file:
        file.truncate(5 << 20)
        file.seek(4 << 20)
        file.write(b"data")
    deep = "/".join(["d" * 200] * 4)
    (changes / deep).mkdir(parents=True)
    (changes / deep / ("n" * 255)).write_text("deep")
    (changes / os.fsdecode(b"not \xff unicode")).write_text("x")
    os.chown(changes / "pipe", 3_000_000_000, 5)
    image = await an_image(images, changes)
    (tree,) = images.layers(image)
    assert (tree / "one").stat().st_ino == (tree / "two").stat().st_ino
    assert os.getxattr(tree / "two", "user.note") == b"\xff\x00kept"
    assert os.getxattr(tree / "one", "security.capability") == capability
    assert stat.S_ISFIFO((tree / "pipe").lstat().st_mode)
    assert (tree / "pipe").lstat().st_uid == 3_000_000_000
    assert (tree / "null").lstat().st_rdev == os.makedev(1, 3)
    assert stat.S_ISBLK((tree / "disk").lstat().st_mode)
    assert not (tree / "socket").exists()
    assert (tree / "sparse").read_bytes() == bytes(4 << 20) + b"data" + bytes((1 << 20) - 4)
    assert (tree / deep / ("n" * 255)).read_text() == "deep"
    assert (tree / os.fsdecode(b"not \xff unicode")).exists()


async def test_links_and_devices_lead_to_nothing_outside(tmp_path: Path, images: ImageStore) -> None:
    outside = a_directory(tmp_path / "outside", secret="secret")
    changes = a_directory(tmp_path / "changes")
    os.symlink(outside, changes / "directory")
    os.symlink(outside / "secret", changes / "file")
    async with images.layer_of_changes(changes, None) as layer:
        found = members_of(images, layer)
    assert {name: member.type for name, member in found.items()} == {
        "directory": tarfile.SYMTYPE,
        "file": tarfile.SYMTYPE,
    }


async def test_a_device_that_takes_a_files_place_is_not_read(tmp_path: Path) -> None:
    """The mount of the worker has no devices: what is swapped after it was looked at cannot be opened."""
    changes = a_directory(tmp_path / "changes")
    os.mknod(changes / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    script = (
        "import os, sys; from skep.linux.confined_root import enter; place = enter(sys.argv[1], read_only=True)\n"
        "try: os.open(place + '/null', os.O_RDONLY)\n"
        "except PermissionError: print('refused')"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", script, str(changes)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert (await process.communicate())[0] == b"refused\n"


async def test_what_is_left_out_is_no_change(tmp_path: Path, images: ImageStore) -> None:
    changes = a_directory(tmp_path / "changes")
    a_directory(changes / "etc", hosts="", hostname="")
    without = ("etc/hosts", "etc/hostname")
    async with images.layer_of_changes(changes, None, without=without) as layer:
        assert layer.diff_id == EMPTY_LAYER
        image = await added(images, layer, None)
    assert image.config.diff_ids == ()
    assert [entry.empty_layer for entry in image.config.history or ()] == [True]
    (changes / "etc" / "passwd").write_text("x")
    async with images.layer_of_changes(changes, None, without=without, take=True) as layer:
        assert set(members_of(images, layer)) == {"etc", "etc/passwd"}
        assert os.listdir(images.layer_store.directory(layer.chain_id) / "etc") == ["passwd"]


async def test_a_file_that_the_user_named_like_a_whiteout_is_refused_by_name(
    tmp_path: Path, images: ImageStore
) -> None:
    changes = a_directory(tmp_path / "changes")
    a_directory(changes / "etc", **{".wh.passwd": ""})
    with pytest.raises(InvalidArgument, match=r'^/etc/\.wh\.passwd: a name that begins with "\.wh\." marks'):
        await an_image(images, changes)
    assert not images.layer_store.all()


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        (ImageLimits(layer_bytes_max=1 << 20), ResourceExhausted),
        (ImageLimits(entries_max=2), ResourceExhausted),
        (ImageLimits(unpack_s=0.001), ResourceExhausted),
        (ImageLimits(spare_bytes=1 << 60, spare_share=1e9), UnpackFailed),
    ],
    ids=["bytes", "entries", "time", "space"],
)
async def test_a_tree_beyond_a_limit_is_refused_and_leaves_nothing(
    tmp_path: Path, limits: ImageLimits, error: type[SkepError]
) -> None:
    images = ImageStore(tmp_path / "images", limits=limits)
    await images.open()
    changes = a_directory(tmp_path / "changes", one="1", two="2", three="3")
    with (changes / "large").open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(error):
        await an_image(images, changes)
    assert not images.layer_store.all()
    assert not list(images.scratch.iterdir())


async def test_a_cancelled_request_leaves_nothing(tmp_path: Path, images: ImageStore) -> None:
    changes = a_directory(tmp_path / "changes")
    with (changes / "large").open("wb") as file:
        file.truncate(32 << 30)
    request = asyncio.create_task(an_image(images, changes))
    async with asyncio.timeout(60):
        while not list(images.scratch.glob("layer-*/content")):  # noqa: ASYNC110  # files announce nothing
            await asyncio.sleep(0.01)
    request.cancel()
    await asyncio.wait([request])
    assert request.cancelled()
    assert not list(images.scratch.iterdir())
