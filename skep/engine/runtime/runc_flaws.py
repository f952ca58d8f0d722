"""Detects known container escapes in this node's runc.

The version of runc is not enough, because distributions fix a flaw without changing it.

Sources: the advisories of opencontainers/runc.  The fixes in a package are listed in its Debian changelog.  They also
follow from the package's version, which Debian's runc prints (``commit: 1.1.5+ds1-1+deb12u1``).
"""

import gzip
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

Version = tuple[int, int, int]

_CHANGELOGS = ("runc/changelog*", "runc-*/changelog*")
_CHANGELOG_BYTES_MAX = 4 << 20
"""Limit in bytes for the part of a changelog that is read."""


class Flaw(NamedTuple):
    """A flaw of runc.  ``fixed_in`` has the first fixed version of each series, oldest series first."""

    name: str
    fixed_in: tuple[Version, ...]
    packages: str = "(?!)"
    """Regular expression that matches package versions that are known to be fixed."""


_SERIES_OF_2025 = ((1, 2, 8), (1, 3, 3), (1, 4, 0))
FLAWS: Final = (
    Flaw("CVE-2024-21626", ((1, 1, 12),), r"1\.1\.5\+ds1-1\+deb12u\d"),
    Flaw("CVE-2025-31133", _SERIES_OF_2025),
    Flaw("CVE-2025-52565", _SERIES_OF_2025),
    Flaw("CVE-2025-52881", _SERIES_OF_2025),
)


def flaws_of(output: str, changelog: str = "") -> list[str]:
    """Return the known escapes that a runc has, by its ``--version`` output.

    ``changelog`` is the changelog of its package, or empty if unknown.
    """
    found = re.search(r"\bversion v?(\d+)\.(\d+)\.(\d+)(-rc\S*)?", output)
    if found is None:
        return []
    version: Version = (int(found[1]), int(found[2]), int(found[3]))
    return [
        flaw.name
        for flaw in FLAWS
        if (_precedes(version, flaw.fixed_in) or (found[4] and version in flaw.fixed_in))
        and flaw.name not in changelog
        and not re.search(flaw.packages, output)
    ]


def warning(output: str, changelog: str) -> str:
    """Return a sentence for ``docker info``, or "" if no flaw of this runc is known."""
    names = flaws_of(output, changelog)
    if not names:
        return ""
    version = output.splitlines()[0].removeprefix("runc version ")
    return (
        f"runc {version} has known container escapes ({', '.join(names)}): upgrade it, or set another runc "
        "with --runc"
    )


def changelog_of(runc: Path, documents: Path = Path("/usr/share/doc")) -> str:
    """Return the changelog of runc's package, or "" without a package or changelog.  Blocks."""
    if not runc.resolve().is_relative_to("/usr") or runc.resolve().is_relative_to("/usr/local"):
        return ""
    return "\n".join(_read(path) for pattern in _CHANGELOGS for path in sorted(documents.glob(pattern)))


def _precedes(version: Version, fixed_in: Iterable[Version]) -> bool:
    """Return whether ``version`` is older than the fix in its series, or older than all fixes."""
    fixes = list(fixed_in)
    of_series = [fix for fix in fixes if fix[:2] == version[:2]]
    return version < (of_series[0] if of_series else fixes[0])


def _read(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(_CHANGELOG_BYTES_MAX).decode(errors="replace")
    except (OSError, EOFError, zlib.error):
        return ""
