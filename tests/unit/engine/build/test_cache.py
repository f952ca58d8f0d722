"""Directories of ``RUN --mount=type=cache``: which step has which, and what a prune takes."""

import asyncio
import hashlib
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.aio.trees import discard_tree
from skep.engine.build.cache import cache
from skep.engine.build.cache.cache import CacheKey, CacheMounts, StepCache, keys_of
from skep.engine.images.digest import Digest
from skep.engine.images.store import ImageStore
from skep.linux.files import NEW_SUFFIX
from tests.support.file_faults import file_faults

texts = st.text(st.characters(exclude_categories=())) | st.sampled_from(["", "sha256:ab", "a\udcffb", '"\\é'])
configs = st.dictionaries(
    texts, texts | st.lists(texts) | st.dictionaries(texts, texts) | st.none(), max_size=4
)


@given(st.lists(texts, min_size=1, max_size=3), configs, texts)
def test_keys_are_hashes_of_an_array(parents: list[str], config: dict[str, Any], author: str) -> None:
    """Nodes of two versions share the index and caches, so the bytes stay, also of names that are not UTF-8."""

    def hashed(parts: list[Any]) -> str:
        try:
            content = msgspec.json.encode(parts, order="deterministic")
        except UnicodeEncodeError:
            content = json.dumps(parts, sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()

    keys = keys_of(parents, config, author)
    if len(parents) == 1 or all(parent.isascii() for parent in parents):
        assert keys == [hashed([parent, config, author]) for parent in parents]


def test_keys_of_earlier_versions_are_found() -> None:
    config = {"Cmd": ["/bin/sh", "-c", "#(nop) ", "ENV A=b"], "Env": ["A=b"]}
    keys = (*keys_of(["sha256:ab", ""], config, "me"), *keys_of([""], {"Cmd": ["a\udcffb"]}, ""))
    assert [key[:16] for key in keys] == ["dc1d81d8b21ef6d5", "06ba7f17cbf43283", "65f92b36a6c36c71"]


async def test_private_directories_of_three_steps_at_once_are_three(tmp_path: Path) -> None:
    mounts = CacheMounts(tmp_path)
    async with AsyncExitStack() as stack:
        places = [
            await stack.enter_async_context(mounts.hold(CacheKey(id="id"), "private")) for _ in range(3)
        ]
    assert len(set(places)) == 3
    async with mounts.hold(CacheKey(id="id"), "private") as again:
        assert again == places[0]


@pytest.mark.parametrize("first", ["private", "locked"])
async def test_a_step_shares_no_directory_that_another_step_has_alone(tmp_path: Path, first: str) -> None:
    mounts = CacheMounts(tmp_path)
    async with (
        mounts.hold(CacheKey(id="id"), first) as own,
        mounts.hold(CacheKey(id="id"), "shared") as place,
    ):
        assert place != own
        async with mounts.hold(CacheKey(id="id"), "shared") as second:
            assert second == place
    async with mounts.hold(CacheKey(id="id"), "shared") as place:
        assert place == own


@pytest.mark.parametrize("first", ["private", "shared", "locked"])
async def test_a_locked_directory_waits_for_every_other_step(tmp_path: Path, first: str) -> None:
    mounts, order = CacheMounts(tmp_path), list[str]()

    async def lock() -> None:
        async with mounts.hold(CacheKey(id="id"), "locked"):
            order.append("locked")

    async with mounts.hold(CacheKey(id="id"), first):
        waiting = asyncio.create_task(lock())
        for _ in range(10):
            await asyncio.sleep(0)
        order.append(first)
    await asyncio.wait_for(waiting, 60)
    assert order == [first, "locked"]


async def test_a_directory_that_a_step_takes_during_a_prune_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = CacheMounts(tmp_path)
    for id in ("one", "two"):
        async with mounts.hold(CacheKey(id=id), "shared") as place:
            (place / "file").write_text(id)
    async with AsyncExitStack() as stack:
        taken = list[Path]()

        async def discard_slowly(path: Path) -> None:
            for id in () if taken else ("one", "two"):
                taken.append(await stack.enter_async_context(mounts.hold(CacheKey(id=id), "shared")))
                (taken[-1] / "new").write_text("new")
            await discard_tree(path)

        monkeypatch.setattr(cache, "discard_tree", discard_slowly)
        gone, _ = await asyncio.wait_for(mounts.prune(), 60)
        assert len(gone) == 1
        assert [(place / "new").read_text() for place in taken] == ["new", "new"]


async def test_a_directory_is_filled_once_and_whole_before_a_step_has_it(tmp_path: Path) -> None:
    mounts, filled = CacheMounts(tmp_path), list[Path]()

    async def fill(directory: Path) -> None:
        filled.append(directory)
        (directory / "first").write_text("1")
        await asyncio.sleep(0)
        (directory / "second").write_text("2")

    async def use() -> None:
        key = CacheKey(id="id", base="sha256:b", mode=0o700, uid=5)
        async with mounts.hold(key, "shared", fill) as place:
            assert {one.name for one in place.iterdir()} == {"first", "second"}
            assert (place.stat().st_mode & 0o777, place.stat().st_uid) == (0o700, 5)

    async def again() -> None:
        key = CacheKey(id="id", base="sha256:b", mode=0o700, uid=5)
        for mode in (0o700, 0o755):
            async with mounts.hold(key, "shared", fill) as place:
                assert place.stat().st_mode & 0o777 == mode, "what a step has changed stays"
                place.chmod(0o755)

    await asyncio.gather(use(), use())
    await again()
    assert len(filled) == 1


async def test_a_directory_whose_first_files_cannot_be_had_is_not_there(tmp_path: Path) -> None:
    async def fill(directory: Path) -> None:
        (directory / "first").write_text("1")
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        async with CacheMounts(tmp_path).hold(CacheKey(id="id", base="b"), "shared", fill):
            pass
    assert list(tmp_path.iterdir()) == []


def test_steps_that_ask_for_other_owners_or_files_have_other_directories() -> None:
    keys = [
        CacheKey(id="id"),
        CacheKey(id="other"),
        CacheKey(id="id", namespace="mine"),
        CacheKey(id="id", base="sha256:b"),
        CacheKey(id="id", uid=0),
        CacheKey(id="id", mode=0o755),
    ]
    assert len({key.name for key in keys}) == len(keys)


async def test_results_of_builds_that_end_at_once_are_written_one_after_the_other(tmp_path: Path) -> None:
    calls: list[str] = []

    def note(call: str, path: Path) -> None:
        if path.name == "steps.json" + NEW_SUFFIX and call in ("open", "replace"):
            calls.append(call)

    steps = StepCache(tmp_path / "steps.json", ImageStore(tmp_path / "images"))

    async def end_of_build(number: int) -> None:
        steps.note(f"{number}", Digest("sha256:" + "0" * 64))  # whose image is gone
        await steps.save()

    with file_faults(tmp_path) as files:
        files.before_each = note
        await asyncio.gather(*map(end_of_build, range(50)))
    assert calls == ["open", "replace"] * 50
    assert (tmp_path / "steps.json").read_bytes() == b"{}"
