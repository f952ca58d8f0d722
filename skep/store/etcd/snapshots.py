"""Takes snapshots of a store, from a running member or from the files of a stopped one, and restores them as a new
store.

A restored store has new ids, so members of the old store cannot connect to it.  Its revisions begin far beyond the old
ones, so that no watch can resume across the gap.

Source: etcd 3.5, etcdutl/snapshot/v3_snapshot.go (a snapshot is the database file and the SHA-256 of it).
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.trees import discard_tree, discard_tree_now
from skep.errors import FailedPrecondition, SkepError
from skep.linux.commands import communicate
from skep.linux.files import NEW_SUFFIX, file_exists, sync_directory
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.process.binary import Binary
from skep.store.etcd.process.damage import Damaged, head_of, is_database
from skep.store.etcd.process.flags import MemberSettings
from skep.store.etcd.process.member import EtcdMember

log = structlog.get_logger()

HASH_BYTES = 32
"""The SHA-256 at the end of a snapshot."""
REVISIONS_BETWEEN = 1_000_000_000
"""Number that is added to the snapshot's revision in a restored store."""

_RESTORE_S = 120.0
"""Timeout in seconds for etcdutl to restore a snapshot.  It is enough for the largest size."""


async def take_snapshot(socket: Path, to: Path) -> None:
    """Write a snapshot of the member behind ``socket``, with or without quorum, durably to the file ``to``.

    Raises:
        FailedPrecondition: The snapshot is incomplete.
        Unavailable: The member did not respond.
    """
    async with EtcdClient(socket) as client:
        await save_snapshot(client.snapshot(), to)


async def save_snapshot(chunks: AsyncIterator[bytes], to: Path) -> None:
    """Write a snapshot's ``chunks`` to the file ``to``, which appears once it is complete.

    Raises:
        FailedPrecondition: The chunks are not a complete snapshot.
    """
    unfinished = to.with_name(to.name + NEW_SUFFIX)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        check = Verified()
        async for chunk in chunks:
            check.update(chunk)
            await asyncio.to_thread(file.write, chunk)
        check.check()
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    os.replace(unfinished, to)
    sync_directory(to.parent)


class Verified:
    """Checks a snapshot incrementally."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._head = b""
        self._tail = b""
        self.size_bytes = 0

    def update(self, chunk: bytes) -> None:
        """Add the next chunk."""
        if len(self._head) < 64:
            self._head += chunk[:64]
        self.size_bytes += len(chunk)
        known = self._tail + chunk
        self._hash.update(known[:-HASH_BYTES])
        self._tail = known[-HASH_BYTES:]

    def check(self) -> None:
        """Raise FailedPrecondition if the chunks so far are not a complete snapshot."""
        if not is_database(self._head):
            raise FailedPrecondition("this is not a snapshot of a store")
        if self._hash.digest() != self._tail:
            raise FailedPrecondition("the snapshot of the store is damaged or incomplete")


async def salvage(settings: MemberSettings, binary: Binary, clock: Clock, to: Path) -> bool:
    """Take a snapshot of a stopped member's files.  Returns whether the result is a bare database file without a hash.

    Without its peers, a member has no quorum.  Therefore a copy of its files is started in its own network namespace,
    where its whole log counts as committed.  So no write is lost that this member has.  If the log is damaged or
    missing, the database file is used, which may lack the last writes.

    Raises:
        Damaged: The database is unreadable too.
        FailedPrecondition: There is not enough space for the copy.
    """
    copy = settings.directory / "salvage"
    sealed_off = msgspec.structs.replace(
        settings, directory=copy, is_solo=True, joins=(), has_hosts=False, is_sealed_off=True
    )
    try:
        await asyncio.to_thread(_copy_files, settings.data, sealed_off.data)
        async with EtcdMember(sealed_off, binary, clock, Backoff(0.1, 0.5)).running():
            await take_snapshot(settings.socket, to)
            return False
    except (SkepError, OSError) as error:
        log.warning(
            "snapshot taken from the database, as the log of the store cannot be used", reason=str(error)
        )
    finally:
        await discard_tree(copy)
    database = settings.data / "member" / "snap" / "db"
    if not is_database(head_of(database)):
        raise Damaged(f"{database} is damaged: restore a backup")
    await asyncio.to_thread(shutil.copyfile, database, to)
    return True


def _copy_files(source: Path, to: Path) -> None:
    discard_tree_now(to.parent)
    shutil.copytree(source, to)


async def restore_store(snapshot: Path, settings: MemberSettings, binary: Binary, *, is_bare: bool) -> None:
    """Restore ``snapshot`` as the store of a single member.  Existing data is kept as ``data.old``.

    Raises:
        FailedPrecondition: etcdutl is missing, or rejects the snapshot.
    """
    new, old = settings.directory / "data.new", settings.directory / "data.old"
    for leftover in (new, *([old] if file_exists(settings.data) else [])):
        await discard_tree(leftover)
    settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        str(_etcdutl(binary)),
        *("snapshot", "restore", str(snapshot), "--name", settings.name, "--data-dir", str(new)),
        *("--initial-cluster", f"{settings.name}={settings.peer_url}"),
        *("--initial-advertise-peer-urls", settings.peer_url),
        *("--initial-cluster-token", settings.cluster_token),
        *("--bump-revision", str(REVISIONS_BETWEEN), "--mark-compacted"),
        *(("--skip-hash-check",) if is_bare else ()),
        env={"PATH": os.environ.get("PATH", os.defpath)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await communicate(process, _RESTORE_S)
    if process.returncode != 0:
        last = stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise FailedPrecondition(f"the snapshot cannot be restored: {''.join(last)}")
    if file_exists(settings.data):
        os.replace(settings.data, old)
    os.replace(new, settings.data)
    sync_directory(settings.directory)


def _etcdutl(binary: Binary) -> Path:
    unfinished = binary.path.with_name("etcdutl")
    found = str(unfinished) if file_exists(unfinished) else shutil.which("etcdutl")
    if found is None:
        raise FailedPrecondition(
            "etcdutl, which restores a store, is missing: install it (Debian: etcd-client)"
        )
    return Path(found)
