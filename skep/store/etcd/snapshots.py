"""Snapshots of a store: taken from a running member, or from what is left of one, and made into a new store.

A store that is made from a snapshot has new ids, so no member of the old one can ever talk to it; its revisions begin
far beyond the old ones, and no watch can go on across them.

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
from skep.linux.files import BESIDE, sync_directory
from skep.store.etcd.binary import Binary
from skep.store.etcd.client import Client
from skep.store.etcd.damage import Damaged, head_of, is_database
from skep.store.etcd.flags import MemberSettings
from skep.store.etcd.member import Member

log = structlog.get_logger()

HASH_BYTES = 32
REVISIONS_BETWEEN = 1_000_000_000
"""By how much the revisions of a restored store are ahead of the snapshot's."""

_RESTORE_S = 120.0


async def take_snapshot(socket: Path, to: Path) -> None:
    """Write what the member behind ``socket`` has, quorum or not, to the file ``to``, safely.

    Raises: FailedPrecondition: what arrived is not whole; Unavailable.
    """
    async with Client(socket) as client:
        await save_snapshot(client.snapshot(), to)


async def save_snapshot(pieces: AsyncIterator[bytes], to: Path) -> None:
    """Write a snapshot's ``pieces`` to the file ``to``, once all of them are there.

    Raises: FailedPrecondition: they are not a whole snapshot.
    """
    beside = to.with_name(to.name + BESIDE)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        check = Verified()
        async for piece in pieces:
            check.update(piece)
            await asyncio.to_thread(file.write, piece)
        check.check()
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    os.replace(beside, to)
    sync_directory(to.parent)


class Verified:
    """Checks a snapshot as its pieces go by."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._head = b""
        self._tail = b""
        self.size_bytes = 0

    def update(self, piece: bytes) -> None:
        """The next piece."""
        if len(self._head) < 64:
            self._head += piece[:64]
        self.size_bytes += len(piece)
        known = self._tail + piece
        self._hash.update(known[:-HASH_BYTES])
        self._tail = known[-HASH_BYTES:]

    def check(self) -> None:
        """Raises: FailedPrecondition: it was no snapshot, or not all of one."""
        if not is_database(self._head):
            raise FailedPrecondition("this is no snapshot of a store")
        if self._hash.digest() != self._tail:
            raise FailedPrecondition("the snapshot of the store is damaged or not whole")


async def salvage(settings: MemberSettings, binary: Binary, clock: Clock, to: Path) -> bool:
    """Take a snapshot of what a stopped member left, at ``to``; whether it is a bare database file.

    Without its others a member serves nobody, so a copy of its files is started in a network namespace of its own,
    where everything in its log counts as decided: no write is lost that this member has.  One whose log is damaged
    or gone still has its database, which may lack the last moments before the end.

    Raises: Damaged: nothing is left that could be read; FailedPrecondition: no space for the copy.
    """
    copy = settings.directory / "salvage"
    sealed_off = msgspec.structs.replace(
        settings, directory=copy, is_solo=True, joins=(), has_hosts=False, is_sealed_off=True
    )
    try:
        await asyncio.to_thread(_copy_files, settings.data, sealed_off.data)
        async with Member(sealed_off, binary, clock, Backoff(0.1, 0.5)).running():
            await take_snapshot(settings.socket, to)
            return False
    except (SkepError, OSError) as error:
        log.warning("the store's own log cannot be used, its database is", reason=str(error))
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
    """Make ``snapshot`` the store of a single member; what its directory held is kept as ``data.old``.

    Raises: FailedPrecondition: etcdutl is missing, or does not take the snapshot.
    """
    new, old = settings.directory / "data.new", settings.directory / "data.old"
    for leftover in (new, *([old] if settings.data.exists() else [])):
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
    _, said = await communicate(process, _RESTORE_S)
    if process.returncode != 0:
        last = said.decode(errors="replace").strip().splitlines()[-1:]
        raise FailedPrecondition(f"the snapshot cannot be restored: {''.join(last)}")
    if settings.data.exists():
        os.replace(settings.data, old)
    os.replace(new, settings.data)
    sync_directory(settings.directory)


def _etcdutl(binary: Binary) -> Path:
    beside = binary.path.with_name("etcdutl")
    found = str(beside) if beside.exists() else shutil.which("etcdutl")
    if found is None:
        raise FailedPrecondition(
            "etcdutl is missing, and only it restores a store: install it (Debian: etcd-client)"
        )
    return Path(found)
