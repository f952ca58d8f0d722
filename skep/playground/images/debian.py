"""Takes programs for images, and the libraries that they need, out of packages of the distribution.

apt downloads and verifies the packages.  Nothing is installed, and no image registry is used.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from skep.errors import FailedPrecondition, SkepError
from skep.playground.commands import run
from skep.playground.images import elf
from skep.playground.images.archive import Entry, File

_DOWNLOAD_WITHIN_S = 300
"""Time limit in seconds for one apt command."""
_LIBRARY = re.compile(r"^(?: *\|?Depends: |    )((?:lib|zlib)[a-z0-9.+-]+)$", re.MULTILINE)
"""Matches a dependency.

Also matches a package that provides one, which is indented further: ``libssl3t64`` below ``Depends: <libssl3>``.
"""
_LIBRARY_FOLDERS = ("lib", "usr/lib", "lib64", "usr/lib64")


async def unpack_with_libraries(directory: Path, *packages: str) -> None:
    """Unpack ``packages`` and every library package that they depend on into ``directory``.

    Raises: FailedPrecondition, Unavailable: apt cannot fetch them.  The message has apt's output.
    """
    try:
        await _download(await _with_libraries(packages), directory)
    except SkepError:
        # A fresh machine has no package lists yet, or old ones.
        await run("apt-get", "-q", "update", deadline_s=_DOWNLOAD_WITHIN_S)
        await _download(await _with_libraries(packages), directory)
    root = directory / "root"
    for archive in sorted(directory.glob("*.deb")):
        await run("dpkg-deb", "--extract", str(archive), str(root))


def program(path: str, directory: Path) -> dict[str, Entry]:
    """Return the program at ``path`` (without a leading slash), its loader and all its libraries as image entries.

    Raises: FailedPrecondition: a library is in none of the unpacked packages.
    """
    root = directory / "root"
    available = _libraries(root)
    content = (root / path).read_bytes()
    entries: dict[str, Entry] = {path: File(content, 0o755)}
    waiting = [content]
    seen: set[str] = set()
    while waiting:
        binary = elf.read(waiting.pop())
        if binary is None:
            continue
        for name in binary.needed:
            if name in seen:
                continue
            seen.add(name)
            if name not in available:
                raise FailedPrecondition(f"{path} needs {name}, which none of its packages contains")
            library = (root / available[name]).read_bytes()
            entries[available[name]] = File(library, 0o755)
            waiting.append(library)
        if loader := binary.interpreter.lstrip("/"):
            entries[loader] = File((root / available[Path(loader).name]).read_bytes(), 0o755)
    return entries


async def _with_libraries(packages: Sequence[str]) -> list[str]:
    """Return ``packages`` and their direct and indirect dependencies that are libraries by their names."""
    found = {*packages}
    waiting = [*packages]
    while waiting:
        shown = (await run("apt-cache", "depends", "--important", *waiting)).decode()
        named = libraries_named(shown)
        waiting = sorted(named - found)
        found |= named
    return sorted(found)


def libraries_named(shown: str) -> set[str]:
    """Return the names of library packages in the output of ``apt-cache depends``."""
    return set(_LIBRARY.findall(shown))


async def _download(packages: list[str], directory: Path) -> None:
    """Download packages into the working directory of ``apt-get download``."""
    # Download as root, because the user _apt may not write into root's directory.  Signatures are still verified.
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages]
    await run("env", "--chdir", str(directory), *command, deadline_s=_DOWNLOAD_WITHIN_S)


def _libraries(root: Path) -> Mapping[str, str]:
    """Return the paths of shared libraries below ``root``, without a leading slash, by file name.  Includes links."""
    found: dict[str, str] = {}
    for folder in _LIBRARY_FOLDERS:
        for directory, _, files in os.walk(root / folder):
            for name in sorted(files):
                if ".so" in name:
                    found.setdefault(name, str((Path(directory) / name).relative_to(root)))
    return found
