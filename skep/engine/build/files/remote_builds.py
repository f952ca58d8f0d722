"""Contexts of the classic API that the node fetches (``POST /build?remote=``): repositories, archives, Dockerfiles.

Source: moby 20.10, builder/remotecontext/detect.go (Detect), git.go, remote.go.
"""

import asyncio
import os
from pathlib import Path

from skep.aio.trees import discard_tree
from skep.api.errors import Untranslated
from skep.engine.build.addresses import redacted_address
from skep.engine.build.dockerfile.dockerfile import FILE_BYTES_MAX
from skep.engine.build.files.context import read_dockerfile
from skep.engine.build.files.copies import is_archive
from skep.engine.build.files.remotes import Download, KnownAnswers, is_remote, repository_address
from skep.engine.build.files.repositories import GitRepository, address_of
from skep.engine.build.files.sources import CopySource
from skep.engine.images.archives.workers import ImageLimits, unpack
from skep.errors import InvalidArgument


async def fetch_context(address: str, directory: Path, limits: ImageLimits, name: str) -> tuple[str, Path]:
    """Fetch a context, and return the text of its Dockerfile and the directory with its files.

    A file that is not an archive is the Dockerfile, and the directory is empty.

    Args:
        directory: Empty, for the files.
        name: Path of the Dockerfile in the context.

    Raises: SkepError: it cannot be fetched, or has no Dockerfile.
    """
    files, fetched = directory / "files", directory / "fetched"
    for one in (files, fetched):
        one.mkdir(mode=0o700)
    if repository := repository_address(address):
        source = await GitRepository(address_of(repository), files, limits, None).fetch()
        files = source.root / source.resolved
    elif is_remote(address):
        room = max(min(limits.archive_bytes_max, limits.room_on(fetched)), 0)
        file = await Download(address, "", fetched, room, KnownAnswers(), None).fetch()
        if not await asyncio.to_thread(is_archive, file):
            return await asyncio.to_thread(_text_of, file), files
        descriptor = os.open(file.root / file.resolved, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await unpack(descriptor, files, limits=limits, is_layer=True, has_whiteouts=False)
        finally:
            os.close(descriptor)
        await discard_tree(fetched)  # the build, which may take hours, needs only the files
    else:
        raise Untranslated(f"remoteURL ({redacted_address(address)}) could not be recognized as URL")
    return await asyncio.to_thread(read_dockerfile, files, name), files


def _text_of(file: CopySource) -> str:
    with (file.root / file.resolved).open("rb") as opened:
        content = opened.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise InvalidArgument(f"the Dockerfile has more than {FILE_BYTES_MAX} bytes")
    return content.decode("utf-8", "surrogateescape")
