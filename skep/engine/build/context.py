"""The context of a classic build: an archive from the client, unpacked into a directory of the build's own.

Source: moby 20.10, builder/remotecontext/detect.go, archive.go.
"""

import os
import stat
from collections.abc import AsyncIterable
from pathlib import Path

from skep.api.errors import Untranslated
from skep.engine.build.copying import Tree
from skep.engine.build.dockerfile import FILE_BYTES_MAX, parse
from skep.engine.build.patterns import ignored_patterns, is_ignored
from skep.engine.images.layers import Limits, unpack
from skep.errors import InvalidArgument
from skep.linux.trees import remove_tree

DEFAULT_NAME = "Dockerfile"
_IGNORE_FILE = ".dockerignore"


async def receive(pieces: AsyncIterable[bytes], directory: Path, limits: Limits) -> None:
    """Unpack a context into the empty ``directory``.

    Raises: InvalidArgument: it is no archive, or a damaged one; ResourceExhausted: it is larger than the node takes;
    UnpackFailed: the disk has no room for it.
    """
    await unpack(pieces, directory, limits=limits, is_layer=True, has_whiteouts=False)


def read_dockerfile(directory: Path, name: str) -> str:
    """The text of the Dockerfile ``name`` in a context, which it never leads out of.

    The Dockerfile and .dockerignore are taken out of the context if the latter says so.  Blocks; for a thread.
    Raises: InvalidArgument: it is empty, no text, or no Dockerfile; Untranslated: it is not there.
    """
    with Tree(directory) as tree:
        chosen = name
        content = _read(tree, chosen)
        if content is None and name == DEFAULT_NAME:
            chosen = name.lower()
            content = _read(tree, chosen)
        if content is None:
            raise Untranslated(f"Cannot locate specified Dockerfile: {name}")
        if not content:
            raise InvalidArgument(f"the Dockerfile ({chosen}) cannot be empty")
        text = content.decode("utf-8", "surrogateescape")
        try:
            parse(text)
        except InvalidArgument as error:
            raise InvalidArgument(f"failed to parse {chosen}: {error}") from error
        _exclude(tree, chosen)
    return text


def _exclude(tree: Tree, dockerfile: str) -> None:
    content = _read(tree, _IGNORE_FILE)
    if content is None:
        return
    patterns = ignored_patterns(content.decode("utf-8", "surrogateescape"))
    for name in (_IGNORE_FILE, os.path.normpath(dockerfile).lstrip("/")):
        if is_ignored(name, patterns):
            directory, last = os.path.split(
                tree.resolve(os.path.dirname(name)) + "/" + os.path.basename(name)
            )
            with tree.opened(directory.strip("/")) as parent:
                remove_tree(Path(f"/proc/self/fd/{parent}") / last)


def _read(tree: Tree, name: str) -> bytes | None:
    """A file of the context; None: there is none.  Raises: InvalidArgument: it is no file, or too large."""
    path = tree.resolve(name)
    status = tree.status(path)
    if status is None:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument(f"{name} is not a regular file")
    with tree.opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
        content = bytearray()
        while data := os.read(descriptor, FILE_BYTES_MAX + 1):
            content += data
            if len(content) > FILE_BYTES_MAX:
                raise InvalidArgument(f"{name} has more than {FILE_BYTES_MAX} bytes")
    return bytes(content)
