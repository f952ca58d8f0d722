"""What is wrong with a member's files, in a sentence that says the way back.

Found before the start where it can be, else by what etcd says when it ends: its own words for damage ("discovery
failed: walpb: crc mismatch", "panic: cannot use none as id") name neither the file nor what to do.  Each was provoked
(``tests/integration/test_etcd_member.py``).
"""

from pathlib import Path

from skep.errors import FailedPrecondition

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

_WORDS = (
    ("crc mismatch", LOG),
    ("cannot use none as id", LOG),  # the log is empty
    ("wal: ", LOG),
    ("walpb", LOG),
    ("unexpected fault address", DATABASE),  # it is shorter than it says
    ("Page expected to be", DATABASE),
    ("assertion failed", DATABASE),
    ("invalid database", DATABASE),
    ("checksum error", DATABASE),
    ("failed to open database", DATABASE),
    ("failed to recover v3 backend", DATABASE),
    ("invalid freelist page", DATABASE),
)
"""Text in etcd's last words -> what it means; first match wins.  Source: etcd 3.5, wal, bbolt."""

_NOT_OF_FILES = (
    "no space left on device",
    "disk quota exceeded",
    "too many open files",
    "cannot allocate memory",
)
"""The disk or the machine has too little of something: nothing is wrong with the files, and it passes."""

_MAGIC_AT, _MAGIC = 16, bytes.fromhex("edda0ced")
"""Of a bbolt database, in the byte order of the machines that we run on."""


class Damaged(FailedPrecondition):
    """A member's files cannot be used; trying again does not help."""


def check_files(data: Path) -> None:
    """Refuse a member directory that etcd would start on and never finish a write, or end on without a clear word.

    Raises: Damaged.
    """
    database, log = data / "member" / "snap" / "db", data / "member" / "wal"
    segments = list(log.glob("*.wal"))
    if database.exists() and not segments:
        raise Damaged(LOG.format(directory=data))
    if database.exists() and not is_database(head_of(database)):
        raise Damaged(DATABASE.format(directory=data))


def named(reason: str, data: Path) -> Damaged | None:
    """What etcd's last words mean; None: nothing about its files."""
    if any(text in reason for text in _NOT_OF_FILES):
        return None
    sentence = next((sentence for text, sentence in _WORDS if text in reason), None)
    return Damaged(f"{sentence.format(directory=data)} (etcd: {reason})") if sentence else None


def head_of(database: Path) -> bytes:
    """Enough of the file for ``is_database``.  Raises: Damaged: it cannot be read."""
    try:
        with database.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise Damaged(f"{DATABASE.format(directory=database)} ({error})") from error


def is_database(head: bytes) -> bool:
    """Whether a file that begins so is a store's database."""
    return head[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC
