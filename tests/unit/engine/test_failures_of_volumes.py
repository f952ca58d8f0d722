"""Whichever call on a file fails while volumes are made, used and removed: each is whole or not there, and the next
attempt works.
"""

from contextlib import suppress
from pathlib import Path

from skep.engine.volumes.volumes import Volumes
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


async def test_whatever_call_fails_a_volume_that_is_removed_is_whole_or_gone(tmp_path: Path) -> None:
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
            await removed.remove("gone", list)
            is_removed = True
        faults.end()
        assert removed.names() == ([] if is_removed else ["gone"])
        if not is_removed:
            assert removed.labels("gone") == LABELS
            assert len(list(removed.path("gone").glob("*/file"))) == 2
            await removed.remove("gone", list)
        await removed.create("gone")  # a new one has nothing of it
        assert (removed.labels("gone"), removed.options("gone")) == (None, {})
        assert not list(removed.path("gone").iterdir())
        await Volumes(directory / "volumes").sweep()  # by the next process
        assert [entry.name for entry in (directory / "volumes").iterdir()] == ["gone"]

    assert await walk(tmp_path / "lives", life, template=template, count=4) > 8


async def test_a_volume_has_nothing_of_one_that_was_half_made(tmp_path: Path) -> None:
    """What says where a volume with options is comes first: alone, it is no volume, and says nothing of the next."""
    volumes = Volumes(tmp_path / "volumes")
    await volumes.create("gone", labels=LABELS, options={"type": "tmpfs", "device": "tmpfs"})
    volumes.path("gone").rmdir()
    assert not volumes.has("gone")
    await volumes.create("gone")
    assert (volumes.labels("gone"), volumes.options("gone")) == (None, {})
