"""Small images of what the distribution has, under the names that stack files use."""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from skep.playground.archive import Archive, Directory, Entry, File, image_archive
from skep.playground.busybox import GROUP, PASSWD, PATH, applets
from skep.playground.commands import find
from skep.playground.debian import program, unpack_with_libraries
from tests.support.playground_rig import TestNode

_CREATED = "2020-01-01T00:00:00Z"


def script(text: str) -> File:
    """A program of the image, for busybox's shell."""
    return File(f"#!/bin/sh\n{text}".encode(), 0o755)


def image(
    tags: Sequence[str],
    entries: Mapping[str, Entry],
    entrypoint: Sequence[str],
    package: str = "",
    path: str = "",
) -> Archive:
    """Busybox with ``entries``, and the program at ``path`` of a Debian package with its libraries."""
    return asyncio.run(_image(tags, entries, entrypoint, package, path))


async def _image(
    tags: Sequence[str], entries: Mapping[str, Entry], entrypoint: Sequence[str], package: str, path: str
) -> Archive:
    found: dict[str, Entry] = {
        "dev": Directory(),
        "proc": Directory(),
        "sys": Directory(),
        "tmp": Directory(0o1777),
        "etc/group": GROUP,
        "etc/passwd": PASSWD,
        **await applets(Path(find("busybox"))),
    }
    if package:
        with tempfile.TemporaryDirectory(prefix="skep-image-") as directory:
            await unpack_with_libraries(package, Path(directory))
            found |= program(path, Path(directory))
    config = {"Entrypoint": list(entrypoint), "Env": [f"PATH={PATH}"]}
    return image_archive({**found, **entries}, tags=tags, created=_CREATED, config=config)


def load(node: TestNode, directory: Path, *archives: Archive) -> None:
    """Load images into one node; others fetch them from it."""
    for archive in archives:
        file = directory / f"{archive.image_id[-12:]}.tar"
        file.write_bytes(archive.data)
        node.docker("load", "--input", str(file))
