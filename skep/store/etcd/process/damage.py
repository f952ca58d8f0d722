"""Detects damaged files of a member, and explains how to recover.

It detects damage before the start if possible, and otherwise from etcd's last output. etcd's own messages ("discovery
failed: walpb: crc mismatch", "panic: cannot use none as id") name neither the file nor a remedy.
``tests/integration/test_etcd_member.py`` reproduces each case.
"""

from pathlib import Path

from skep.errors import FailedPrecondition
from skep.linux.files import file_exists

_AMONG_OTHERS = (
    "With other managers: docker swarm leave --force here, docker node demote and docker node rm for this node there, "
    "then join again."
)
LOG = (
    "{directory}: the store's log is damaged or gone while its database is there. "
    + _AMONG_OTHERS
    + " Alone: docker swarm init --force-new-cluster goes on from the database."
)
DATABASE = (
    "{directory}: the store's database is damaged or gone. "
    + _AMONG_OTHERS
    + " Alone: docker swarm leave --force, then skep restore a backup."
)

_MESSAGES = (
    ("crc mismatch", LOG),
    ("cannot use none as id", LOG),  # the log is empty
    ("wal: ", LOG),
    ("walpb", LOG),
    ("unexpected fault address", DATABASE),  # the file is truncated
    ("Page expected to be", DATABASE),
    ("assertion failed", DATABASE),
    ("invalid database", DATABASE),
    ("checksum error", DATABASE),
    ("failed to open database", DATABASE),
    ("failed to recover v3 backend", DATABASE),
    ("invalid freelist page", DATABASE),
)
"""Pairs of a text in etcd's last output and the error text.  The first match counts.  Source: etcd 3.5, wal, bbolt."""

_NOT_OF_FILES = (
    "no space left on device",
    "disk quota exceeded",
    "too many open files",
    "cannot allocate memory",
)
"""Texts in etcd's output that mean a lack of resources.  The files are not damaged, and a later start may succeed."""

_MAGIC_AT, _MAGIC = 16, bytes.fromhex("edda0ced")
"""Magic number of a bbolt database, little-endian."""


class Damaged(FailedPrecondition):
    """A member's files are damaged, so a retry does not help."""


def check_files(data: Path) -> None:
    """Reject files on which etcd would start without ever finishing a write, or exit without a clear message.

    Raises Damaged.
    """
    database, log = data / "member" / "snap" / "db", data / "member" / "wal"
    segments = list(log.glob("*.wal"))
    if file_exists(database) and not segments:
        raise Damaged(LOG.format(directory=data))
    if file_exists(database) and not is_database(head_of(database)):
        raise Damaged(DATABASE.format(directory=data))


def damage_reported(reason: str, data: Path) -> Damaged | None:
    """Return the damage that etcd's last output reports, or None."""
    if any(text in reason for text in _NOT_OF_FILES):
        return None
    sentence = next((sentence for text, sentence in _MESSAGES if text in reason), None)
    return Damaged(f"{sentence.format(directory=data)} (etcd: {reason})") if sentence else None


def head_of(database: Path) -> bytes:
    """Return enough of the file for ``is_database``.  Raises Damaged if it is unreadable."""
    try:
        with database.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise Damaged(f"{DATABASE.format(directory=database)} ({error})") from error


def is_database(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is a bbolt database."""
    return head[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC
