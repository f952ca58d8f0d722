"""Whichever call on a file fails while an image is made or named: nothing is half there, and the next attempt works.

What the confined workers call is not walked here: they are processes of their own, and end with an error.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skep.engine.images.child import HistoryStep, child_config
from skep.engine.images.image import ContainerDefaults
from skep.engine.images.platforms import this_platform
from skep.engine.images.reference import parse_reference
from skep.engine.images.store import ImageStore, ImportRequest, import_tree
from skep.errors import SkepError
from skep.model.values.times import Timestamp
from tests.support.engine.oci_rig import QuickClock
from tests.support.file_faults import Faults, walk
from tests.support.images.archives import a_file, a_tar

NOW = Timestamp("2026-01-02T03:04:05Z")
BASE, COMMITTED, TAGGED = "base:1", "committed:1", "tagged:1"


async def opened(directory: Path) -> ImageStore:
    store = ImageStore(directory, clock=QuickClock())
    await store.open()
    return store


async def imported(store: ImageStore, name: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield a_tar(a_file("imported", name.encode()))

    request = ImportRequest(
        reference=parse_reference(name), comment="", config=ContainerDefaults(), platform=this_platform()
    )
    await import_tree(store, pieces(), request, NOW)


async def committed(store: ImageStore, changes: Path) -> None:
    parent = store.get(BASE)
    async with store.layer_of_changes(changes, parent) as layer:
        config = store.config_file(parent).read_bytes()
        content = child_config(config, HistoryStep(created=NOW, diff_id=layer.diff_id), {})
        await store.add(content, [parse_reference(COMMITTED)], parent=parent.id, is_tagged=True)


async def images_are_made(directory: Path, faults: Faults) -> None:
    changes = directory.parent.parent / "changes"
    store = await opened(directory)
    done = set()
    for name, work in (
        (COMMITTED, lambda: committed(store, changes)),
        (TAGGED, lambda: store.tag(BASE, parse_reference(TAGGED))),
    ):
        try:
            await work()
        except (SkepError, OSError):
            continue
        done.add(name)
    faults.end()
    whole = await opened(directory)  # what the next process finds
    await whole.settle()
    for name in (COMMITTED, TAGGED):
        assert name not in done or whole.resolve(name) is not None, f"{name} was acknowledged"
    assert all(image.tags for image in whole.images()), "an image without its name is left"
    assert len(whole.layer_store.all()) == len({id for image in whole.images() for id in image.chain})
    await committed(whole, changes)
    await whole.tag(BASE, parse_reference(TAGGED))
    assert {str(tag) for image in whole.images() for tag in image.tags} == {
        f"docker.io/library/{name}" for name in (BASE, COMMITTED, TAGGED)
    }
    top, _ = whole.layers(whole.get(COMMITTED))
    assert os.listdir(top) == ["new"]
    assert not list(whole.scratch.iterdir())


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
async def test_whatever_call_fails_an_image_is_whole_or_not_there_and_the_next_one_works(
    tmp_path: Path, step: int
) -> None:
    (tmp_path / "changes").mkdir()
    (tmp_path / "changes/new").write_text("new")
    await imported(await opened(tmp_path / "template"), BASE)
    calls = await walk(tmp_path / "lives", images_are_made, template=tmp_path / "template", step=step)
    assert calls > 40
