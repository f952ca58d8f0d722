"""Detects known container escapes in this node's OCI runtimes.

The version is not enough, because distributions fix a flaw without changing it.

Sources: the advisories of opencontainers/runc, and the NEWS of containers/crun.  The fixes in a package
are listed in its Debian changelog.  Fixes of runc also follow from the package's version, which Debian's runc prints
(``commit: 1.1.5+ds1-1+deb12u1``).
"""

import gzip
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

Version = tuple[int, int, int]

_CHANGELOG_BYTES_MAX = 4 << 20
"""Limit in bytes for the part of a changelog that is read."""


class Flaw(NamedTuple):
    """A flaw of a runtime.  ``fixed_in`` has the first fixed version of each series, oldest series first."""

    name: str
    fixed_in: tuple[Version, ...]
    packages: str = "(?!)"
    """Regular expression that matches package versions that are known to be fixed."""


_SERIES_OF_2025 = ((1, 2, 8), (1, 3, 3), (1, 4, 0))
"""First fixed version of each series.  Source: runc's releases of November 2025."""
FLAWS: Final[Mapping[str, tuple[Flaw, ...]]] = {
    "runc": (
        Flaw("CVE-2024-21626", ((1, 1, 12),), r"1\.1\.5\+ds1-1\+deb12u\d"),
        Flaw("CVE-2025-31133", _SERIES_OF_2025),
        Flaw("CVE-2025-52565", _SERIES_OF_2025),
        Flaw("CVE-2025-52881", _SERIES_OF_2025),
    ),
    # CVE-2026-30892 is not here: it is in ``crun exec --user``, which conmon does not use.
    "crun": (Flaw("CVE-2026-47766", ((1, 28, 0),)),),
}


def flaws_of(runtime: str, output: str, changelog: str = "") -> list[str]:
    """Return the known escapes that a runtime has, by its ``--version`` output.

    ``changelog`` is the changelog of its package, or empty if unknown.
    """
    found = re.search(r"\bversion v?(\d+)\.(\d+)(?:\.(\d+))?(-rc\S*)?", output)
    if found is None:
        return []
    version: Version = (int(found[1]), int(found[2]), int(found[3] or 0))
    return [
        flaw.name
        for flaw in FLAWS[runtime]
        if (_precedes(version, flaw.fixed_in) or (found[4] and version in flaw.fixed_in))
        and flaw.name not in changelog
        and not re.search(flaw.packages, output)
    ]


def warning(runtime: str, output: str, changelog: str) -> str:
    """Return a sentence for ``docker info``, or "" if no flaw of this runtime is known."""
    names = flaws_of(runtime, output, changelog)
    if not names:
        return ""
    version = output.splitlines()[0].removeprefix(f"{runtime} version ")
    return (
        f"{runtime} {version} has known container escapes ({', '.join(names)}): upgrade it, or set another "
        f"{runtime} with --{runtime}"
    )


def changelog_of(runtime: str, program: Path, documents: Path = Path("/usr/share/doc")) -> str:
    """Return the changelog of a runtime's package, or "" without a package or changelog.  Blocks."""
    if not program.resolve().is_relative_to("/usr") or program.resolve().is_relative_to("/usr/local"):
        return ""
    paths = [*documents.glob(f"{runtime}/changelog*"), *documents.glob(f"{runtime}-*/changelog*")]
    return "\n".join(_read(path) for path in sorted(paths))


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
