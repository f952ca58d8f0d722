"""Each call on a file that a node keeps may fail: it says so, goes on when it can, and has lost nothing."""

import asyncio
import hashlib
import io
import shutil
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from skep.errors import SkepError
from skep.node.oci.images import layers, pulling
from skep.node.oci.images.layers import Unpacked
from skep.node.oci.images.reference import Reference
from skep.node.oci.images.registry import DOCKER_MANIFEST, Document
from skep.node.oci.images.store import ImageStore
from tests.archives import a_config, a_file, a_tar, sha256
from tests.file_faults import Faults, walk
from tests.oci_rig import QuickClock
from tests.registry_rig import a_manifest

OLD, NEW = a_tar(a_file("old", b"old")), a_tar(a_file("new", b"new"))


class MemoryRepository:
    """In the place of ``Repository``: an image of one layer, not compressed."""

    def __init__(self, layer: bytes) -> None:
        config = a_config(layer)
        self._blobs = {sha256(content): content for content in (config, layer)}
        self._manifest = a_manifest(config, (layer,))

    async def manifest(self, name: str, bytes_max: int) -> Document:
        return Document(media_type=DOCKER_MANIFEST, content=self._manifest)

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield self._blobs[digest][start:]

        yield start, pieces()


@asynccontextmanager
async def connected(_policy: object, reference: Reference, _auth: object) -> AsyncIterator[MemoryRepository]:
    yield MemoryRepository(OLD if "old" in str(reference) else NEW)


async def unpack(source: int, target: Path, **_: Any) -> Unpacked:
    """In this process, so that its calls fail as well."""

    def work() -> Unpacked:
        content = b""
        while piece := layers.os.read(source, 1 << 20):
            content += piece
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                (target / member.name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
        (target.parent / "content").write_bytes(content)
        return Unpacked("sha256:" + hashlib.sha256(content).hexdigest(), len(content), len(content))

    return await asyncio.to_thread(work)


async def opened(directory: Path) -> ImageStore:
    store = ImageStore(directory, clock=QuickClock())
    await store.open()
    return store


def content_of(store: ImageStore, word: str) -> set[str]:
    (top,) = store.layers(store.get(word))
    return {f"{path.name}: {path.read_text()}" for path in top.iterdir()}


async def images_come_and_the_process_changes(directory: Path, faults: Faults) -> None:
    first = await opened(directory)
    try:
        await first.pull("new:1")
    except* (SkepError, OSError):
        pass
    second = await opened(directory)
    try:
        await second.pull("new:1")
        await second.tag("new:1", Reference("docker.io", "library/other", "1"))
        await second.remove("new:1", users=())
    except* (SkepError, OSError):
        pass
    faults.end()
    said: list[str] = []
    await second.settle(said.append)
    assert said[-1] == second.trouble == ""
    await second.pull("new:1")
    third = await opened(directory)
    await third.settle()
    for store in (second, third):
        assert content_of(store, "old:1") == {"old: old"}
        assert content_of(store, "new:1") == {"new: new"}
        assert len(store.images()) == len(store.layer_store.all()) == 2
    assert {path.name for path in directory.iterdir()} == {"configs", "layers", "tmp", "catalog.json"}
    assert list(third.scratch.iterdir()) == []


@pytest.mark.parametrize(("count", "step"), [(1, 1), (25, 11)])
async def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, step: int) -> None:
    monkeypatch.setattr(pulling, "connected", connected)
    monkeypatch.setattr(layers, "unpack", unpack)
    await (await opened(tmp_path / "template")).pull("old:1")
    assert (
        await walk(
            tmp_path / "lives",
            images_come_and_the_process_changes,
            template=tmp_path / "template",
            count=count,
            step=step,
        )
        > 100
    )
    shutil.rmtree(tmp_path / "lives")
