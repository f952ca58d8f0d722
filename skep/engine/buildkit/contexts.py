"""Directories that builds receive from their clients, and directories kept for later builds.

For a repeated context, the client sends only changed files.  The last tree is kept under a key that the client sends
for the same directory each time, and unchanged files are hard-linked from it.  A complete tree is never changed.
"""

import os
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from skep.aio.trees import discard_tree
from skep.engine.buildkit.protocol.filesync import SyncSelection, receive
from skep.engine.buildkit.protocol.sessions import BuildSession
from skep.engine.buildkit.tree import FileType, KeptTree, TreeEntry, TreeLimits
from skep.engine.images.archives.workers import ImageLimits, unpack

_KEPT_MAX = 8
"""Number of kept trees.  The least recently used is dropped first."""
_KEPT_BYTES_MAX = 2 << 30
"""A larger tree is not kept."""


class ContextStore:
    """All trees below ``directory``, which only this object uses."""

    def __init__(self, directory: Path, limits: ImageLimits) -> None:
        self.directory = directory
        """Private to this engine: files below it have owners and modes of other machines."""
        self.limits = limits
        self._kept: OrderedDict[tuple[str, str], KeptTree] = OrderedDict()
        self._used: dict[Path, int] = {}
        """Trees that builds read, or link files from, at this moment."""

    def sizes(self) -> Mapping[str, int]:
        """Return the bytes of files in each kept tree, by name."""
        return {
            tree.root.name: sum(entry.size for entry in tree.entries.values()) for tree in self._kept.values()
        }

    async def prune(self, unused_since_ns: int | None = None) -> list[str]:
        """Drop kept trees and return their names.  Running builds keep the trees that they use until they end.

        Args:
            unused_since_ns: Keep the trees that were received since then.  None keeps none.
        """
        gone = [
            key
            for key, tree in self._kept.items()
            if unused_since_ns is None or os.stat(tree.root).st_ctime_ns < unused_since_ns
        ]
        names = [self._kept.pop(key).root.name for key in gone]
        await self._sweep()
        return names

    @asynccontextmanager
    async def receive(
        self,
        session: BuildSession,
        selection: SyncSelection,
        *,
        bytes_max: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> AsyncIterator[Path]:
        """Provide a directory of the client while the block runs.  Raises: as ``filesync.receive``."""
        key = (session.shared_key, selection.name)
        can_keep = bool(session.shared_key) and not selection.follow
        limits = TreeLimits(bytes=bytes_max or self.limits.archive_bytes_max)
        kept = self._kept.get(key) if can_keep else None
        root = self._new()
        uses = [root] if kept is None else [root, kept.root]
        for used in uses:
            self._used[used] = self._used.get(used, 0) + 1
        try:
            entries = await receive(
                session,
                selection,
                root,
                limits,
                room_bytes=self.limits.room_on(root),
                kept=kept,
                progress=progress,
            )
            if can_keep and sum(entry.size for entry in entries) <= _KEPT_BYTES_MAX:
                self._keep(key, root, entries)
            yield root
        finally:
            for used in uses:
                await self._release(used)

    @asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """Provide an empty directory while the block runs."""
        root = self._new()
        self._used[root] = 1
        try:
            yield root
        finally:
            await self._release(root)

    async def unpack(self, archive: Path, root: Path) -> None:
        """Unpack an archive into an empty directory.  Raises: InvalidArgument, ResourceExhausted, UnpackFailed."""
        descriptor = os.open(archive, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await unpack(descriptor, root, limits=self.limits, is_layer=True, has_whiteouts=False)
        finally:
            os.close(descriptor)

    def accepted_on(self, directory: Path) -> int:
        """Return the bytes of a context that may be written to one of the directories."""
        return max(min(self.limits.archive_bytes_max, self.room_on(directory)), 0)

    def room_on(self, directory: Path) -> int:
        """Return the bytes that may still be written to one of the directories."""
        return self.limits.room_on(directory)

    def _new(self) -> Path:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)  # files in it may be setuid
        root = self.directory / secrets.token_hex(8)
        root.mkdir(mode=0o755)
        return root

    def _keep(self, key: tuple[str, str], root: Path, entries: Sequence[TreeEntry]) -> None:
        files = {entry.path: entry for entry in entries if entry.kind is FileType.FILE}
        self._kept[key] = KeptTree(root, files)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_MAX:
            self._kept.popitem(last=False)

    async def _release(self, root: Path) -> None:
        self._used[root] -= 1
        if not self._used[root]:
            del self._used[root]
            await self._sweep()

    async def _sweep(self) -> None:
        """Remove trees that are not used or kept."""
        if not self.directory.exists():
            return
        for path in sorted(self.directory.iterdir()):
            if path not in self._used and all(path != tree.root for tree in self._kept.values()):
                await discard_tree(path)
