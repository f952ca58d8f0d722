"""Finds the etcd program, and checks that its version is accepted.

The search order is the configured path, the copy that the set-up installs in the Python environment, then ``$PATH``.
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
"""Older versions are refused.  They lose data after a crash (3.5.0-3.5.2), or do not serve clients on a unix socket
(3.4).
"""

REFUSED_FROM, REFUSED_BEFORE = (3, 6, 0), (3, 6, 5)
"""Versions from the first to before the second are refused.  They do not start on data of 3.5 in which a member was
promoted (etcd issue 19557).
"""

RECOMMENDED = (3, 5, 26)
"""Earlier versions cause a warning.  They do not store promotions completely, so that a later 3.6 fails (etcd issue
20797).
"""

SAFE_UPGRADE_FROM = (3, 5, 24)
"""The version that must have run on a directory before 3.6 may start on it."""

_VERSION = re.compile(r"etcd Version: (\d+)\.(\d+)\.(\d+)")
_INSTALL = "install etcd 3.5.26 or newer (Debian: etcd-server), or run `make setup`"


class Binary(msgspec.Struct, frozen=True):
    """An accepted etcd."""

    path: Path
    version: tuple[int, int, int]


class _CachedVersion(msgspec.Struct, frozen=True):
    """The version of an etcd file, and the attributes that identify the file."""

    path: str
    device: int
    inode: int
    size: int
    changed_ns: int
    version: tuple[int, int, int] = (0, 0, 0)


def find_binary(configured: Path | None = None, remembered: Path | None = None) -> Binary:
    """Return the etcd to run.

    Args:
        remembered: A file that caches the version, because running ``etcd --version`` takes longer than everything
            else.

    Raises:
        FailedPrecondition: etcd was not found, or its version is not accepted.
    """
    path = configured or _installed() or _on_path()
    if path is None:
        raise FailedPrecondition(f"etcd is missing: {_INSTALL}")
    version = version_of(path) if remembered is None else _known_version(path, remembered)
    check_version(path, version)
    return Binary(path, version)


def _known_version(path: Path, remembered: Path) -> tuple[int, int, int]:
    """Return the version of ``path``, from the cache if it describes the same file.  Raises FailedPrecondition."""
    try:
        found = path.stat()
    except OSError:
        return version_of(path)
    this = _CachedVersion(str(path), found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns)
    with suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(remembered.read_bytes(), type=_CachedVersion)
        if msgspec.structs.replace(known, version=this.version) == this:
            return known.version
    found_version = msgspec.structs.replace(this, version=version_of(path))
    with suppress(OSError):
        replace_file(remembered, msgspec.json.encode(found_version), mode=0o600, is_durable=False)
    return found_version.version


def version_of(path: Path) -> tuple[int, int, int]:
    """Return the version that ``etcd --version`` prints.  Raises FailedPrecondition."""
    try:
        # The environment is empty, because etcd takes ETCD_... variables for flags.
        ran = subprocess.run(
            [path, "--version"], env={}, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FailedPrecondition(f"{path} cannot be run ({error}): {_INSTALL}") from error
    match = _VERSION.search(ran.stdout)
    if match is None:
        raise FailedPrecondition(f"{path} --version prints no version: {_INSTALL}")
    major, minor, patch = map(int, match.groups())
    return major, minor, patch


def check_version(path: Path, version: tuple[int, int, int]) -> None:
    """Raise FailedPrecondition if this version is not accepted."""
    name = ".".join(map(str, version))
    if version < OLDEST:
        raise FailedPrecondition(f"{path} is etcd {name}, which is too old: {_INSTALL}")
    if REFUSED_FROM <= version < REFUSED_BEFORE:
        raise FailedPrecondition(f"{path} is etcd {name}, which loses members on upgraded data: {_INSTALL}")
    if version < RECOMMENDED:
        log.warning(
            "etcd version older than recommended",
            path=str(path),
            version=name,
            recommended=".".join(map(str, RECOMMENDED)),
        )


def check_upgrade(served_by: tuple[int, int, int] | None, version: tuple[int, int, int]) -> None:
    """Check that ``version`` may start on a directory last used by version ``served_by``.

    Raises FailedPrecondition.
    """
    if served_by is None or served_by[:2] == version[:2]:
        return
    old, new = (".".join(map(str, one)) for one in (served_by, version))
    if version < served_by:
        raise FailedPrecondition(f"the store was last used by etcd {old}: etcd {new} cannot read it")
    if version[:2] != (served_by[0], served_by[1] + 1) or served_by < SAFE_UPGRADE_FROM:
        raise FailedPrecondition(
            f"the store was last used by etcd {old}: run etcd 3.5.26 or newer on it once before etcd {new}"
        )


def _installed() -> Path | None:
    installed = Path(sys.prefix) / "libexec" / "skep" / "etcd"
    return installed if installed.exists() else None


def _on_path() -> Path | None:
    found = shutil.which("etcd")
    return Path(found) if found else None
