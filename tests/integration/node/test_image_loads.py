"""Archives of images, good and hostile, against what a real engine said to the same bytes."""

import asyncio
import bz2
import gzip
import hashlib
import io
import lzma
import os
import stat
import tarfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import zstandard
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.server import application
from skep.engine.api.images import image_routes
from skep.engine.images.archives.archive import Unpackaged, write_archive
from skep.engine.images.archives.workers import ImageLimits, UnpackFailed
from skep.engine.images.reference import parse_reference
from skep.engine.images.removal import ImageUser
from skep.engine.images.store import ImageStore
from skep.errors import ResourceExhausted, SkepError
from tests.conformance.record_image_loads import RECORDED, Answer, answer_of
from tests.support.harness.own_time import own_time
from tests.support.images.archives import (
    GOOD,
    HOSTILE,
    a_config,
    a_docker_archive,
    a_file,
    a_layer,
    a_tar,
    an_entry,
    sha256,
)

RESPONSES = msgspec.json.decode((RECORDED / "image_loads.json").read_bytes(), type=dict[str, Answer])
IDS = msgspec.json.decode((RECORDED / "image_ids.json").read_bytes(), type=dict[str, str])

DIFFERENCES = {
    "layer is a named pipe": "open pipe: no such file or directory",  # the engine waits for ever
    "manifest is null": "invalid manifest, manifest cannot be null (but can be [])",  # as engines since 25
    "configuration outside": "open etc/passwd: no such file or directory",  # the engine names its own directory
    "layer is a link loop": "evalSymlinksInScope: too many links in a",  # likewise
}
"""What this node says where the engine's answer is none, or of its own machine."""


@pytest.fixture
async def images(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images")
    await store.open()
    return store


@pytest.fixture
async def client(images: ImageStore) -> AsyncIterator[TestClient]:
    async with TestClient(TestServer(application(image_routes(images, lambda: ())))) as client:
        yield client


async def pieces(archive: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(archive), 1 << 16):
        yield archive[start : start + (1 << 16)]


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE)
async def test_an_archive_is_answered_as_the_engine_answers_it(
    client: TestClient, images: ImageStore, name: str
):
    response = await client.post("/v1.41/images/load?quiet=1", data=pieces(HOSTILE[name]()))
    answer = answer_of(response.status, await response.read())
    if name in DIFFERENCES:
        assert answer == Answer(status=200, error=DIFFERENCES[name])
    else:
        # the engine had loaded others before; that it says so is not about this archive
        expected = RESPONSES[name]
        stream = "".join(line for line in expected.stream.splitlines(True) if line.startswith("Loaded"))
        assert answer == msgspec.structs.replace(expected, stream=stream)
    if answer.error:
        assert not images.images()
        assert not images.layer_store.all()


@pytest.mark.parametrize("name", HOSTILE)
async def test_nothing_of_an_archive_leaves_the_store(tmp_path: Path, images: ImageStore, name: str):
    trap = Path("/tmp/escaped")
    assert not trap.exists()
    try:
        await images.load(pieces(HOSTILE[name]()))
    except SkepError:
        assert files_below(tmp_path / "images") <= {"configs", "layers", "tmp", "catalog.json"}
    assert files_below(tmp_path) - {"images"} == {
        f"images/{name}" for name in files_below(tmp_path / "images")
    }
    assert not trap.exists()


async def test_a_name_outside_lands_inside_the_layer(images: ImageStore):
    (image,) = await images.load(pieces(HOSTILE["name outside in a layer"]()))
    (layer,) = images.layers(image)
    assert (layer / "escaped").read_bytes() == b"x"


async def test_a_link_that_is_written_through_stays_inside_the_layer(images: ImageStore):
    layer = a_tar(
        an_entry("tmp", tarfile.DIRTYPE),
        an_entry("out", tarfile.SYMTYPE, "/tmp"),
        a_file("out/escaped", b"x"),
    )
    (image,) = await images.load(pieces(a_docker_archive(layer)))
    (directory,) = images.layers(image)
    assert (directory / "tmp" / "escaped").read_bytes() == b"x"
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("form", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
async def test_layers_and_archives_may_be_compressed(images: ImageStore, form):
    layer = a_layer(a_file("data", os.urandom(100_000)))
    (image,) = await images.load(pieces(form(a_docker_archive(layer, stored={0: form(layer)}))))
    assert image.id == sha256(a_config(layer))
    assert (images.layers(image)[0] / "data").stat().st_size == 100_000


async def test_owners_modes_times_and_attributes_are_kept(images: ImageStore):
    program, content = a_file("sudo", b"#!", mode=0o4755, uid=7, gid=8, mtime=1_600_000_000)
    marks = {f"SCHILY.xattr.{kind}.overlay.redirect": "/etc" for kind in ("trusted", "user")}
    program.pax_headers = {"SCHILY.xattr.user.note": "kept", **marks}
    (image,) = await images.load(pieces(a_docker_archive(a_layer((program, content)))))
    file = images.layers(image)[0] / "sudo"
    status = file.stat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o4755, 7, 8)
    assert status.st_mtime == 1_600_000_000
    assert os.getxattr(file, "user.note") == b"kept"
    assert os.listxattr(file) == ["user.note"], "what overlayfs reads itself is not taken from an archive"


async def test_whiteouts_take_the_form_that_overlayfs_reads(images: ImageStore):
    upper = a_tar(
        a_file("etc/.wh.hostname"),
        an_entry("opt", tarfile.DIRTYPE),
        a_file("opt/.wh..wh..opq"),
        a_file("opt/new"),
    )
    (image,) = await images.load(pieces(a_docker_archive(a_layer(), upper)))
    top, bottom = images.layers(image)
    hidden = (top / "etc" / "hostname").lstat()
    assert stat.S_ISCHR(hidden.st_mode)
    assert hidden.st_rdev == 0
    assert os.getxattr(top / "opt", "trusted.overlay.opaque") == b"y"
    assert sorted(path.name for path in (top / "opt").iterdir()) == ["new"]
    assert (bottom / "etc" / "hostname").read_bytes() == b"box\n"


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, zstandard.compress])
async def test_a_bomb_is_refused_at_the_limit_and_leaves_nothing(tmp_path: Path, compress):
    store = ImageStore(tmp_path / "images", limits=ImageLimits(layer_bytes_max=8 << 20))
    await store.open()
    layer = a_layer(a_file("zeros", bytes(64 << 20)))
    with pytest.raises(ResourceExhausted, match="unpacks to more than 8388608 bytes, the limit of this node"):
        await store.load(pieces(a_docker_archive(layer, stored={0: compress(layer)})))
    assert files_below(tmp_path / "images") == {"configs", "layers", "tmp"}


async def test_a_sparse_file_counts_with_its_full_size(tmp_path: Path):
    store = ImageStore(tmp_path / "images", limits=ImageLimits(layer_bytes_max=8 << 20))
    await store.open()
    sparse, content = a_file("holes", b"")
    sparse.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.name": "holes",
        "GNU.sparse.size": str(1 << 40),
        "GNU.sparse.map": f"{1 << 40},0",
    }
    with pytest.raises(ResourceExhausted, match="unpacks to more than"):
        await store.load(pieces(a_docker_archive(a_layer((sparse, content)))))


async def test_an_archive_of_countless_files_is_refused(tmp_path: Path):
    store = ImageStore(tmp_path / "images", limits=ImageLimits(entries_max=50))
    await store.open()
    layer = a_tar(*(a_file(f"f{number}") for number in range(100)))
    with pytest.raises(ResourceExhausted, match="holds more than 50 entries"):
        await store.load(pieces(a_docker_archive(layer)))


async def test_unpacking_stops_before_the_disk_is_full(tmp_path: Path):
    store = ImageStore(tmp_path / "images", limits=ImageLimits(spare_bytes=1 << 60, spare_share=1.0))
    await store.open()
    with pytest.raises(UnpackFailed, match="no space left on device"):
        await store.load(pieces(a_docker_archive(a_layer())))


async def test_what_is_saved_loads_elsewhere_as_the_same_image(tmp_path: Path, images: ImageStore):
    (image,) = await images.load(
        pieces(a_docker_archive(a_layer(), a_tar(a_file("x", b"y" * 1000)), tags=["a/b:1"]))
    )
    saved = b"".join([piece async for piece in images.save(["a/b:1"])])
    other = ImageStore(tmp_path / "other")
    await other.open()
    (loaded,) = await other.load(pieces(saved))
    assert (loaded.id, loaded.references) == (image.id, image.references)
    again = b"".join([piece async for piece in other.save(["a/b:1"])])
    assert hashlib.sha256(again).digest() == hashlib.sha256(saved).digest()


async def test_an_oci_layout_loads_with_the_names_in_its_index(tmp_path: Path, images: ImageStore):
    (tmp_path / "layer").write_bytes(a_layer())
    buffer = io.BytesIO()
    package = Unpackaged(
        config=a_config(a_layer()), layers=[tmp_path / "layer"], names=[parse_reference("oci:1")]
    )
    write_archive(buffer, [package])
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        kept = [
            (member, archive.extractfile(member).read())
            for member in archive.getmembers()
            if member.name not in ("manifest.json", "repositories")
        ]
    (image,) = await images.load(pieces(a_tar(*kept)))
    assert [tag.familiar for tag in image.tags] == ["oci:1"]
    assert image.id == sha256(package.config)


@pytest.mark.parametrize("name", GOOD)
async def test_an_image_has_the_id_that_the_engine_gives_it(images: ImageStore, name: str):
    (image,) = await images.load(pieces(GOOD[name]()))
    assert [tag.familiar for tag in image.tags] == [name]
    assert image.id == IDS[name]


async def test_a_removed_image_keeps_the_layers_that_a_container_stands_on(images: ImageStore):
    (image,) = await images.load(pieces(a_docker_archive(a_layer())))
    stopped = [ImageUser("c" * 64, image.id, False)]
    removed = await images.remove(image.id, force=True, users=lambda: stopped)
    assert removed.deleted == (image.id,)
    assert not images.images()
    assert images.layer_store.all()
    await images.sweep(list)
    assert not images.layer_store.all()


async def test_layers_go_with_the_last_image_that_has_them(images: ImageStore):
    shared, own = a_layer(), a_tar(a_file("own", b"1"))
    await images.load(pieces(a_docker_archive(shared, tags=["base:1"])))
    await images.load(pieces(a_docker_archive(shared, own, tags=["app:1"])))
    assert len(images.layer_store.all()) == 2
    await images.remove("app:1", users=list)
    assert len(images.layer_store.all()) == 1
    await images.remove("base:1", users=list)
    assert not images.layer_store.all()


async def test_what_an_interrupted_load_left_is_gone_after_a_restart(tmp_path: Path, images: ImageStore):
    await images.load(pieces(a_docker_archive(a_layer())))
    (images.scratch / "layer-half").mkdir()
    (tmp_path / "images" / "configs" / "half.new").write_bytes(b"{")
    for config in (tmp_path / "images" / "configs").glob("*"):
        if not config.suffix:
            config.unlink()
    again = ImageStore(tmp_path / "images")
    await again.open()
    assert not again.images()
    await again.settle()
    assert files_below(tmp_path / "images") == {"configs", "layers", "tmp", "catalog.json"}


async def test_two_concurrent_loads_of_an_image_give_one(images: ImageStore):
    archive = a_docker_archive(a_layer(a_file("big", os.urandom(1 << 20))))
    first, second = await asyncio.gather(images.load(pieces(archive)), images.load(pieces(archive)))
    assert first == second
    assert len(images.layer_store.all()) == 1


async def test_the_loop_goes_on_while_a_layer_is_unpacked(images: ImageStore):
    archive = a_docker_archive(a_layer(*(a_file(f"f{number}", b"x" * 1000) for number in range(3000))))
    lags = []

    async def watch() -> None:
        while True:
            before = own_time()
            await asyncio.sleep(0.005)
            lags.append(own_time() - before - 0.005)

    watching = asyncio.ensure_future(watch())
    await images.load(pieces(archive))
    watching.cancel()
    assert max(lags) < 0.2


async def test_an_upload_that_breaks_off_leaves_nothing(client: TestClient, images: ImageStore):
    archive = a_docker_archive(a_layer(a_file("big", os.urandom(1 << 20))))
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"POST /images/load HTTP/1.1\r\nHost: node\r\nContent-Length: %d\r\n\r\n" % len(archive))
    writer.write(archive[: len(archive) // 2])
    await writer.drain()
    writer.transport.abort()
    for _ in range(500):
        if list(images.scratch.iterdir()):
            break  # it has begun
        await asyncio.sleep(0.01)
    for _ in range(500):
        if not list(images.scratch.iterdir()):
            break
        await asyncio.sleep(0.01)
    assert not list(images.scratch.iterdir())
    assert not images.images()
    del reader


@pytest.mark.parametrize("by", ["workspace", "layer"])
async def test_a_load_cancelled_at_its_start_leaves_nothing(
    images: ImageStore, tmp_path: Path, by: str
) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    content = tmp_path / "layer.tar"
    content.write_bytes(a_layer(a_file("a")))

    async def work() -> None:
        if by == "layer":
            digest = sha256(content.read_bytes())
            await images.layer_store.add(content, chain_id=digest, diff_id=digest)
        else:
            async with images.workspace("load"):
                await asyncio.Event().wait()

    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    await asyncio.to_thread(int)  # what the one thread had to do before is done
    assert not list(images.scratch.iterdir())
