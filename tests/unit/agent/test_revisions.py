"""What a node has seen, it has seen: over restarts, and of its own cluster only."""

import asyncio
from pathlib import Path

import pytest

from skep.agent.session.revisions import SeenRevision
from skep.errors import FailedPrecondition
from skep.model.node_reports.revisions import Revision
from skep.model.values.ids import ClusterId

HERE, ELSEWHERE = ClusterId("here"), ClusterId("elsewhere")


async def kept(path: Path, *revisions: Revision) -> None:
    """Take ``revisions`` and wait until the last one is on disk."""
    seen = SeenRevision(path, HERE)
    writing = asyncio.create_task(seen.run())
    for revision in revisions:
        seen.advance(revision)
    async with asyncio.timeout(10):
        while SeenRevision(path, HERE).seen != seen.seen:  # noqa: ASYNC110 -- there is no event
            await asyncio.sleep(0.005)
    writing.cancel()


async def test_a_lower_revision_is_refused_after_a_restart_too(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    await kept(path, Revision(1, 7), Revision(1, 40))
    seen = SeenRevision(path, HERE)
    with pytest.raises(FailedPrecondition, match=r"behind: it shows revision 1.39, this node has seen 1.40"):
        seen.advance(Revision(1, 39))
    seen.advance(Revision(1, 40))


async def test_a_lower_incarnation_is_refused_a_higher_one_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    await kept(path, Revision(2, 3))
    seen = SeenRevision(path, HERE)
    with pytest.raises(FailedPrecondition):
        seen.advance(Revision(1, 1000))
    seen.advance(Revision(3, 1))
    assert seen.seen == Revision(3, 1)


async def test_what_was_seen_of_another_cluster_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    await kept(path, Revision(5, 5))
    assert SeenRevision(path, ELSEWHERE).seen == Revision()


def test_a_damaged_file_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    path.write_text("{")
    assert SeenRevision(path, HERE).seen == Revision()
