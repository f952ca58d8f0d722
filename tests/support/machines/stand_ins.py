"""Small images of the distribution's programs, with the names that stack files use."""

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from skep.playground.commands import find
from skep.playground.images import elf
from skep.playground.images.archive import (
    Archive,
    ArchivedDirectory,
    Entry,
    File,
    SymbolicLink,
    image_archive,
)
from skep.playground.images.busybox import GROUP, PASSWD, PATH, applets
from skep.playground.images.debian import program, unpack_with_libraries
from tests.support.machines.playground_rig import TestNode

_CREATED = "2020-01-01T00:00:00Z"


def script(text: str) -> File:
    """Return a program of the image, for busybox's shell."""
    return File(f"#!/bin/sh\n{text}".encode(), 0o755)


def image(
    tags: Sequence[str],
    entries: Mapping[str, Entry],
    entrypoint: Sequence[str],
    packages: Sequence[str] = (),
    paths: Sequence[str] = (),
) -> Archive:
    """Return an image of busybox with ``entries``, and the files at ``paths`` of Debian packages with their libraries.

    Args:
        paths: patterns of programs and folders, without a leading slash.
    """
    return asyncio.run(_image(tags, entries, entrypoint, packages, paths))


async def _image(
    tags: Sequence[str],
    entries: Mapping[str, Entry],
    entrypoint: Sequence[str],
    packages: Sequence[str],
    paths: Sequence[str],
) -> Archive:
    found: dict[str, Entry] = {
        "dev": ArchivedDirectory(),
        "proc": ArchivedDirectory(),
        "sys": ArchivedDirectory(),
        "tmp": ArchivedDirectory(0o1777),
        "etc/group": GROUP,
        "etc/passwd": PASSWD,
        **await applets(Path(find("busybox"))),
    }
    if packages:
        with tempfile.TemporaryDirectory(prefix="skep-image-") as directory:
            await unpack_with_libraries(Path(directory), *packages)
            for path in paths:
                found |= _unpacked(path, Path(directory))
    config = {"Entrypoint": list(entrypoint), "Env": [f"PATH={PATH}"]}
    return image_archive({**found, **entries}, tags=tags, created=_CREATED, config=config)


def _unpacked(pattern: str, directory: Path) -> dict[str, Entry]:
    """Return the programs at ``pattern``, and everything below the folders there."""
    root = directory / "root"
    found: dict[str, Entry] = {}
    places = sorted(root.glob(pattern))
    assert places, f"the packages have no {pattern}"
    for file in chain(places, *(place.rglob("*") for place in places if place.is_dir())):
        name = str(file.relative_to(root))
        if file.is_symlink():
            found[name] = SymbolicLink(str(file.readlink()))
        elif file.is_file():
            content = file.read_bytes()
            if elf.read(content):
                found |= program(name, directory)
            else:
                found[name] = File(content, file.stat().st_mode & 0o777)
    return found


def local_program(name: str, path: str) -> Mapping[str, Entry]:
    """Return a program of this machine as ``name`` of an image, with its libraries.  Needs no network."""
    own = os.path.realpath(path).lstrip("/")
    with tempfile.TemporaryDirectory(prefix="skep-image-") as directory:
        (Path(directory) / "root").symlink_to("/")
        found = program(own, Path(directory))
    return {**found, name: found.pop(own)}


def load(node: TestNode, directory: Path, *archives: Archive) -> None:
    """Load images into one node.  Other nodes fetch them from it."""
    for archive in archives:
        file = directory / f"{archive.image_id[-12:]}.tar"
        file.write_bytes(archive.data)
        node.docker("load", "--input", str(file))
