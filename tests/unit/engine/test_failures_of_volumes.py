"""Whichever call on a file fails while volumes are made, used and removed: each is whole or not there, and the next
attempt works.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from skep.engine.volumes import Volumes
from skep.errors import SkepError
from tests.support.file_faults import Faults, walk

LABELS, OPTIONS = {"a": "b"}, {"type": "tmpfs", "device": "tmpfs"}


async def test_whatever_call_fails_a_volume_has_what_it_was_made_with_or_is_not_there(tmp_path: Path) -> None:
    async def life(directory: Path, faults: Faults) -> None:
        volumes = Volumes(directory / "volumes")
        with suppress(SkepError, OSError):
            await volumes.create("made", labels=LABELS, options=OPTIONS)
        with suppress(SkepError, OSError):
            await volumes.create("plain", labels={})
            await volumes.note_use("plain", "user", 7)
        faults.end()
        again = Volumes(directory / "volumes")  # what the next process finds
        again.open()
        assert [again.labels(name) for name in again.names() if name == "made"] in ([], [LABELS])
        assert [again.options(name) for name in again.names() if name == "made"] in ([], [OPTIONS])
        assert again.uses.get("plain", {}) in ({}, {"user": 7})
        for one in (volumes, again):
            await one.create("made", labels=LABELS, options=OPTIONS)
            await one.create("plain", labels={})
            await one.note_use("plain", "user", 8)
            assert (one.names(), one.labels("made"), one.options("made")) == (
                ["made", "plain"],
                LABELS,
                OPTIONS,
            )
            assert one.uses["plain"] == {"user": 8}

    assert await walk(tmp_path, life) > 15


class Sorted:
    """``os.scandir`` in the order of names, a volume's directory first: that of file systems is any."""

    def __init__(self, path: int | str, scan: Callable[..., Any] = os.scandir) -> None:
        with scan(path) as found:
            self._entries = iter(sorted(found, key=lambda entry: entry.name))

    def __iter__(self) -> Iterator[Any]:
        return self._entries

    def __next__(self) -> Any:
        return next(self._entries)

    def __enter__(self) -> "Sorted":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._entries = iter(())


async def test_whatever_call_fails_a_volume_that_is_removed_is_gone_or_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "scandir", Sorted)
    template = tmp_path / "template"
    volumes = Volumes(template / "volumes")
    await volumes.create("gone", labels=LABELS, options={})
    await volumes.note_use("gone", "user", 7)
    for name in ("one", "two"):
        (volumes.path("gone") / name).mkdir()
        (volumes.path("gone") / name / "file").write_text("data")

    async def life(directory: Path, faults: Faults) -> None:
        removed = Volumes(directory / "volumes")
        is_removed = False
        with suppress(SkepError):
            await removed.remove("gone")
            is_removed = True
        faults.end()
        left = directory / "volumes/gone"
        assert not (is_removed and left.exists())
        is_empty = left.exists() and not any(left.iterdir())
        assert is_removed or removed.has("gone") or is_empty, "what cannot be seen is not removed again"
        if is_empty:  # a new one has nothing of it
            await removed.create("gone")
            assert (removed.labels("gone"), removed.options("gone")) == (None, {})
        if not is_removed:
            await removed.remove("gone")
        assert not left.exists()

    assert await walk(tmp_path / "lives", life, template=template, count=4) > 8


async def test_a_volume_has_nothing_of_one_whose_removal_failed(tmp_path: Path) -> None:
    """What says where a volume with options is goes last: alone, it is no volume, and says nothing of the next one."""
    volumes = Volumes(tmp_path / "volumes")
    await volumes.create("gone", labels=LABELS, options={"type": "tmpfs", "device": "tmpfs"})
    volumes.path("gone").rmdir()
    assert not volumes.has("gone")
    await volumes.create("gone")
    assert (volumes.labels("gone"), volumes.options("gone")) == (None, {})
