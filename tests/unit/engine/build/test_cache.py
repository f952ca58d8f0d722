"""Directories of ``RUN --mount=type=cache``: which step has which, and what a prune takes."""

import asyncio
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from skep.aio.trees import discard_tree
from skep.engine.build import cache
from skep.engine.build.cache import CacheMounts, StepCache
from skep.engine.images.digest import Digest
from skep.engine.images.store import ImageStore
from skep.linux.files import replace_file


async def test_private_directories_of_three_steps_at_once_are_three(tmp_path: Path) -> None:
    mounts = CacheMounts(tmp_path)
    async with AsyncExitStack() as stack:
        places = [await stack.enter_async_context(mounts.used("id", "private")) for _ in range(3)]
    assert len(set(places)) == 3
    async with mounts.used("id", "private") as again:
        assert again == places[0]


async def test_a_directory_that_a_step_takes_during_a_prune_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = CacheMounts(tmp_path)
    for id in ("one", "two"):
        async with mounts.used(id, "shared") as place:
            (place / "file").write_text(id)
    async with AsyncExitStack() as stack:
        taken = list[Path]()

        async def discard_slowly(path: Path) -> None:
            for id in () if taken else ("one", "two"):
                taken.append(await stack.enter_async_context(mounts.used(id, "shared")))
                (taken[-1] / "new").write_text("new")
            await discard_tree(path)

        monkeypatch.setattr(cache, "discard_tree", discard_slowly)
        gone, _ = await asyncio.wait_for(mounts.prune(), 60)
        assert len(gone) == 1
        assert [(place / "new").read_text() for place in taken] == ["new", "new"]


async def test_results_of_builds_that_end_at_once_are_written_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, overlaps = threading.Lock(), list[str]()

    def noted(path: Path, content: bytes) -> None:
        if not alone.acquire(blocking=False):
            overlaps.append("two at once")
            return
        try:
            replace_file(path, content)
        finally:
            alone.release()

    monkeypatch.setattr(cache, "replace_file", noted)
    steps = StepCache(tmp_path / "steps.json", ImageStore(tmp_path / "images"))

    async def end_of_build(number: int) -> None:
        steps.note(f"{number}", Digest("sha256:" + "0" * 64))  # whose image is gone
        await steps.save()

    await asyncio.gather(*map(end_of_build, range(50)))
    assert not overlaps
    assert (tmp_path / "steps.json").read_bytes() == b"{}"
