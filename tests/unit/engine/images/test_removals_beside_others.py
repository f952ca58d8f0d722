"""Images that are removed while containers are made of them, and while they are named and come again."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from skep.engine.api.containers import image_users
from skep.engine.images import local
from skep.engine.images.digest import chain_ids, digest_of, hex_of
from skep.engine.images.image import Image
from skep.engine.images.layers import Layer
from skep.engine.images.progress import quiet
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.endpoints import TransferLimits
from skep.engine.images.registry.pulling import pull_from
from skep.engine.images.registry.registry import OCI_MANIFEST, Document
from skep.engine.images.removal import ImageUser
from skep.engine.images.store import ImageStore
from tests.support.engine.oci_rig import Machine, memory_engine, new_container
from tests.support.file_faults import file_faults
from tests.support.images.archives import a_config

CONTENT = b"a layer"
CONFIG = a_config(CONTENT)
ID, (CHAIN_ID,) = digest_of(CONFIG), chain_ids([digest_of(CONTENT)])
USERS = [ImageUser("c" * 64, ID, is_running=False)]


async def opened(root: Path) -> ImageStore:
    store = ImageStore(root)
    await store.open()
    await store.settle()
    return store


@pytest.fixture
async def store(tmp_path: Path) -> ImageStore:
    """It has one image, ``app:1``."""
    directory = tmp_path / "images/layers" / hex_of(CHAIN_ID)
    (directory / "diff").mkdir(parents=True)
    layer = Layer(chain_id=CHAIN_ID, diff_id=digest_of(CONTENT), size_bytes=1, plain_bytes=len(CONTENT))
    (directory / "layer.json").write_bytes(msgspec.json.encode(layer))
    store = ImageStore(tmp_path / "images")
    await store.open()
    await store.add(CONFIG, [parse_reference("app:1")])
    return store


@pytest.mark.parametrize("prunes", [False, True])
async def test_the_layers_of_a_container_that_is_created_meanwhile_stay(
    store: ImageStore, tmp_path: Path, *, prunes: bool
) -> None:
    users: list[ImageUser] = []

    def create_user(call: str, _path: Path) -> None:
        if call == "replace":
            users[:] = USERS

    with file_faults(tmp_path) as files:
        files.before_each = create_user
        if prunes:
            await store.prune(lambda _: True, users=lambda: users)
        else:
            await store.remove("app:1", users=lambda: users)
    assert users
    for one in (store, await opened(tmp_path / "images")):
        assert one.images() == ()
        assert set(one.layer_store.all()) == {CHAIN_ID}
    await store.sweep(list)
    assert not store.layer_store.all()


async def test_what_a_removal_takes_is_decided_on_the_names_that_there_are_by_then(store: ImageStore) -> None:
    tagging = asyncio.create_task(store.tag("app:1", parse_reference("other:1")))
    await asyncio.wait([tagging], timeout=0)  # it writes
    removed = await store.remove("app:1", users=list)
    await tagging
    assert (removed.untagged, removed.deleted) == (("app:1",), ())
    assert store.get("other:1").id == ID


async def test_an_image_that_comes_again_is_not_swept(store: ImageStore, tmp_path: Path) -> None:
    await store.remove("app:1", force=True, users=lambda: USERS)
    coming = asyncio.create_task(store.add(CONFIG, [parse_reference("app:1")]))
    await asyncio.wait([coming], timeout=0)
    await store.sweep(list)
    await coming
    for one in (store, await opened(tmp_path / "images")):
        assert one.get("app:1").id == ID
        assert set(one.layer_store.all()) == {CHAIN_ID}


async def test_the_layers_of_a_removed_image_go_with_its_last_container(
    store: ImageStore, tmp_path: Path
) -> None:
    engine = memory_engine(tmp_path, Machine())
    engine.images = store
    async with engine.running():
        containers = [
            await engine.add(msgspec.structs.replace(new_container(name), image_id=ID)) for name in "ab"
        ]
        await store.remove(ID, force=True, users=lambda: image_users(engine))
        for container in containers:
            assert store.layer_store.all()
            await engine.remove(container.id)
    assert not store.layer_store.all()


class Repository:
    """A registry's repository with the image."""

    transfers = TransferLimits()

    async def manifest(self, target: str, bytes_max: int) -> Document:
        descriptors = [{"digest": digest_of(one), "size": len(one)} for one in (CONFIG, CONTENT)]
        manifest = {"schemaVersion": 2, "config": descriptors[0], "layers": descriptors[1:]}
        return Document(msgspec.json.encode({**manifest, "mediaType": OCI_MANIFEST}), OCI_MANIFEST)

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        async def pieces() -> AsyncIterator[bytes]:
            assert digest == ID, "the layer is here"
            yield CONFIG

        yield 0, pieces()

    def mistrust(self, digest: str) -> bool:
        return False


async def test_a_pull_of_an_image_that_is_removed_meanwhile_fetches_it_again(
    store: ImageStore, tmp_path: Path
) -> None:
    gone = threading.Event()

    class Slow(type(tmp_path)):  # type: ignore[misc]
        """A file that is read once it is gone."""

        def read_bytes(self) -> bytes:
            assert gone.wait(10)
            return Path(self).read_bytes()

    class SlowStore(ImageStore):
        def config_file(self, image: Image) -> Path:
            return Slow(super().config_file(image))

    slow = SlowStore(tmp_path / "images")
    await slow.open()
    pulling = asyncio.create_task(pull_from(slow, Repository(), parse_reference("app:1"), quiet))
    await asyncio.wait([pulling], timeout=0.05)
    await slow.remove("app:1", users=list)
    gone.set()
    assert (await pulling).id == ID
    assert slow.get("app:1").id == ID
    assert set(slow.layer_store.all()) == {CHAIN_ID}


OTHER = CONFIG.replace(b"{", b'{"author":"another", ', 1)


async def test_an_image_that_cannot_be_deleted_stays_removed_and_keeps_no_other(
    store: ImageStore, tmp_path: Path
) -> None:
    with file_faults(tmp_path) as faults:
        faults.choose(errno.EIO, lambda call, path: (call, path.name) == ("unlink", hex_of(ID)))
        await store.add(OTHER, [parse_reference("other:1")])
        await store.remove("app:1", users=list)
        for one in (store, await opened(tmp_path / "images")):
            assert [image.id for image in one.images()] == [digest_of(OTHER)]
        await store.remove("other:1", users=list)
        assert not (tmp_path / "images/configs" / hex_of(digest_of(OTHER))).exists()
    await store.sweep(list)
    assert not list((tmp_path / "images/configs").iterdir())
    assert not store.layer_store.all()


async def test_an_image_that_comes_again_as_its_removal_is_cut_off_is_whole(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: Path) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(local, "discard_tree", never)
        removing = asyncio.create_task(store.remove("app:1", users=list))
        while store.images() or (tmp_path / "images/configs" / hex_of(ID)).exists():  # noqa: ASYNC110
            await asyncio.sleep(0)
        removing.cancel()
        await asyncio.wait([removing])
    await store.add(CONFIG, [parse_reference("app:1")])
    for one in (store, await opened(tmp_path / "images")):
        assert [image.id for image in one.images()] == [ID]


async def test_an_image_that_is_removed_while_it_is_saved_is_saved_whole(
    store: ImageStore, tmp_path: Path
) -> None:
    (tmp_path / "images/layers" / hex_of(CHAIN_ID) / "content").write_bytes(CONTENT)
    other = await store.add(a_config(), [parse_reference("other:1")])
    config = store.config_file(other)
    content = config.read_bytes()
    config.unlink()
    os.mkfifo(config)

    async def save() -> bytes:
        return b"".join([piece async for piece in store.save(["app:1", "other:1"])])

    saving = asyncio.create_task(save())
    async with asyncio.timeout(60):
        writer = await asyncio.to_thread(os.open, config, os.O_WRONLY)  # once the second image is read
        await store.remove("app:1", users=tuple)
        os.write(writer, content)
        os.close(writer)
        assert CONTENT in await saving
    assert not store.layer_store.all()
