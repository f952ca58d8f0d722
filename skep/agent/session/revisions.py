"""The newest revision of assignments that this node has seen.  It never decreases, even across a restart.

Without this check, a manager that lags behind the others, or was restored from an old copy, would undo newer
assignments.  Only a higher incarnation (after a restore, or a forced new cluster) may start again at a lower revision.
"""

import asyncio
from pathlib import Path

import msgspec
import structlog

from skep.aio.clock import Clock, SystemClock
from skep.aio.failures import retry
from skep.linux.files import is_no_file, replace_file
from skep.model.node_reports.revisions import Revision, advanced
from skep.model.values.ids import ClusterId

log = structlog.get_logger(__name__)


class _File(msgspec.Struct, frozen=True):
    cluster: ClusterId
    seen: Revision


class SeenRevision:
    """The newest revision that this node has seen of its cluster, kept in a file."""

    def __init__(self, path: Path | None, cluster: ClusterId, clock: Clock | None = None) -> None:
        """Read the revision from ``path``, or keep it only in memory if ``path`` is None.

        A file of another cluster, or a damaged one, is ignored.

        Raises:
            OSError: The file cannot be read now.
        """
        self._path = path
        self._cluster = cluster
        self._clock = clock or SystemClock()
        self._changed = asyncio.Event()
        self._seen = _read(path, cluster) if path is not None else Revision()

    @property
    def seen(self) -> Revision:
        """The newest revision."""
        return self._seen

    def advance(self, offered: Revision) -> None:
        """Record ``offered`` as the newest revision.  Raises: FailedPrecondition: it is older than ``seen``."""
        before, self._seen = self._seen, advanced(self._seen, offered)
        if before != self._seen:
            self._changed.set()

    async def run(self) -> None:
        """Write the newest revision to the file after each change, until cancelled.  Retries while the disk fails.

        After a crash during a write, the file has the revision before.  The node may then accept assignments that are
        slightly too old from a lagging manager.
        """
        if self._path is None:
            await asyncio.Event().wait()
        while True:
            await self._changed.wait()
            self._changed.clear()
            await retry(self._write, "revision not written", clock=self._clock, longest_s=10.0)

    async def _write(self) -> None:
        assert self._path is not None, "run returns without a path"
        content = msgspec.json.encode(_File(self._cluster, self._seen))
        await asyncio.to_thread(replace_file, self._path, content)


def _read(path: Path, cluster: ClusterId) -> Revision:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return Revision()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise
        log.warning("revision cannot be read: counting starts again", path=str(path), error=str(error))
        return Revision()
    return kept.seen if kept.cluster == cluster else Revision()
