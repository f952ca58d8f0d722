"""Finding an etcd that may be trusted with the cluster.

Order: what the configuration names, what set-up placed beside the Python environment, ``$PATH``.
"""

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from skep.errors import FailedPrecondition
from skep.linux.files import replace_file

log = structlog.get_logger()

OLDEST = (3, 5, 16)
"""Older ones lose data after a crash (3.5.0-3.5.2), or do not serve clients on a unix socket (3.4)."""

REFUSED_FROM, REFUSED_BEFORE = (3, 6, 0), (3, 6, 5)
"""These do not start on data of 3.5 in which a member was promoted (etcd issue 19557)."""

ADVISED = (3, 5, 26)
"""Before it, promotions are not fully stored, which a later 3.6 stumbles over (etcd issue 20797)."""

SAFE_UPGRADE_FROM = (3, 5, 24)
"""What must have served a directory before 3.6 may start on it."""

_VERSION = re.compile(r"etcd Version: (\d+)\.(\d+)\.(\d+)")
_INSTALL = "install etcd 3.5.26 or newer (Debian: etcd-server), or run `make setup`"


class Binary(msgspec.Struct, frozen=True):
    """An etcd that may be used."""

    path: Path
    version: tuple[int, int, int]


class _Asked(msgspec.Struct, frozen=True):
    """What a file said of its version; every other file differs in one of these."""

    path: str
    device: int
    inode: int
    size: int
    changed_ns: int
    version: tuple[int, int, int] = (0, 0, 0)


def find_binary(configured: Path | None = None, remembered: Path | None = None) -> Binary:
    """The etcd to run.

    Args:
        remembered: keeps what the last one said of its version, which takes longer to ask than all else here.

    Raises: FailedPrecondition: none, or not a usable version, with what to do.
    """
    path = configured or _placed() or _on_path()
    if path is None:
        raise FailedPrecondition(f"etcd is missing: {_INSTALL}")
    version = version_of(path) if remembered is None else _known_version(path, remembered)
    check_version(path, version)
    return Binary(path, version)


def _known_version(path: Path, remembered: Path) -> tuple[int, int, int]:
    """What ``path`` says, or said when it was asked last.  Raises: FailedPrecondition."""
    try:
        found = path.stat()
    except OSError:
        return version_of(path)
    this = _Asked(str(path), found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns)
    with suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(remembered.read_bytes(), type=_Asked)
        if msgspec.structs.replace(known, version=this.version) == this:
            return known.version
    asked = msgspec.structs.replace(this, version=version_of(path))
    with suppress(OSError):
        replace_file(remembered, msgspec.json.encode(asked), mode=0o600, is_durable=False)
    return asked.version


def version_of(path: Path) -> tuple[int, int, int]:
    """What ``etcd --version`` says.  Raises: FailedPrecondition."""
    try:
        # Its environment is empty: etcd takes ETCD_... variables for flags.
        ran = subprocess.run(
            [path, "--version"], env={}, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FailedPrecondition(f"{path} cannot be run ({error}): {_INSTALL}") from error
    match = _VERSION.search(ran.stdout)
    if match is None:
        raise FailedPrecondition(f"{path} does not say its version: {_INSTALL}")
    major, minor, patch = map(int, match.groups())
    return major, minor, patch


def check_version(path: Path, version: tuple[int, int, int]) -> None:
    """Raises: FailedPrecondition: this version is not to be used."""
    name = ".".join(map(str, version))
    if version < OLDEST:
        raise FailedPrecondition(f"{path} is etcd {name}, which is too old: {_INSTALL}")
    if REFUSED_FROM <= version < REFUSED_BEFORE:
        raise FailedPrecondition(f"{path} is etcd {name}, which loses members on upgraded data: {_INSTALL}")
    if version < ADVISED:
        log.warning("etcd is old", path=str(path), version=name, advised=".".join(map(str, ADVISED)))


def check_upgrade(served_by: tuple[int, int, int] | None, version: tuple[int, int, int]) -> None:
    """Whether ``version`` may start on a directory last served by ``served_by``.

    Raises: FailedPrecondition.
    """
    if served_by is None or served_by[:2] == version[:2]:
        return
    old, new = (".".join(map(str, one)) for one in (served_by, version))
    if version < served_by:
        raise FailedPrecondition(f"the store was last served by etcd {old}: etcd {new} cannot read it")
    if version[:2] != (served_by[0], served_by[1] + 1) or served_by < SAFE_UPGRADE_FROM:
        raise FailedPrecondition(
            f"the store was last served by etcd {old}: run etcd 3.5.26 or newer on it once before etcd {new}"
        )


def _placed() -> Path | None:
    placed = Path(sys.prefix) / "libexec" / "skep" / "etcd"
    return placed if placed.exists() else None


def _on_path() -> Path | None:
    found = shutil.which("etcd")
    return Path(found) if found else None
