"""Local volumes: directories of the node that outlive the containers which use them."""

import asyncio
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import msgspec

from skep.aio.guard import explain, report
from skep.aio.trees import remove_tree
from skep.engine.syscalls import open_in_root
from skep.errors import InvalidArgument, Unavailable
from skep.linux.commands import communicate
from skep.linux.files import replace_file

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_COPY_DEADLINE_S = 600.0
_LABELS = "labels.json"
_NAMELESS = re.compile(r"[0-9a-f]{64}")
ANONYMOUS = "com.docker.volume.anonymous"
"""Docker's label of a volume that nobody gave a name."""


class Volumes:
    """The volumes of one node, each at ``<data>/volumes/<name>/_data``, with its labels beside in ``labels.json``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> Path:
        """Where a volume's files are.  Raises: InvalidArgument, with Docker's words: no name for a volume."""
        if len(name) == 1:
            raise InvalidArgument(
                f"create {name}: volume name is too short, names should be at least two alphanumeric characters"
            )
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f'create {name}: "{name}" includes invalid characters for a local volume name,'
                ' only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory,'
                " use absolute path"
            )
        return self._directory / name / "_data"

    def names(self) -> list[str]:
        """All volumes of the node, sorted."""
        try:
            return sorted(entry.name for entry in self._directory.iterdir() if (entry / "_data").is_dir())
        except FileNotFoundError:
            return []  # nothing has asked for a volume yet

    def created_ns(self, name: str) -> int:
        """When the volume was made, Unix time."""
        return self.path(name).parent.stat().st_mtime_ns

    def ensure(self, name: str, labels: Mapping[str, str] | None = None) -> Path:
        """The volume's directory, made if there is none, with ``labels`` then; one that is there keeps its own."""
        path = self.path(name)
        if path.is_dir():
            return path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if labels is not None:  # before the directory, with which the volume is there
            replace_file(path.parent / _LABELS, msgspec.json.encode(labels))
        path.mkdir(mode=0o755, exist_ok=True)
        return path

    def labels(self, name: str) -> Mapping[str, str] | None:
        """As the volume was made with; None: it was made without saying, by a container, or nobody knows."""
        try:
            return msgspec.json.decode((self.path(name).parent / _LABELS).read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {ANONYMOUS: ""} if _NAMELESS.fullmatch(name) else None
        except Exception as error:  # whatever it is, it is one volume
            report(error, "labels of a volume not read", volume=name)
            return None

    async def remove(self, name: str) -> None:
        """Remove a volume with everything in it.  Raises: Unavailable: something of it is left."""
        try:
            await remove_tree(self.path(name).parent)
        except OSError as error:
            raise Unavailable(f"cannot remove volume {name}: {explain(error)}") from error

    @staticmethod
    def new_name() -> str:
        """A name for a volume without one: 64 hexadecimal characters, as Docker's."""
        return secrets.token_hex(32)


async def copy_up(root: Path, destination: str, volume: Path) -> None:
    """Fill an empty volume with what the image has at its mount point, owner and mode of the directory
    included.

    Raises: Unavailable: the copy failed.
    """
    if any(volume.iterdir()):
        return
    try:
        source = open_in_root(root, destination, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # the image has nothing there
    try:
        process = await asyncio.create_subprocess_exec(
            *("cp", "-a", f"/proc/self/fd/{source}/.", str(volume)),
            pass_fds=(source,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await communicate(process, _COPY_DEADLINE_S)
    except TimeoutError as error:
        raise Unavailable(f"cannot fill volume {volume.parent.name}: it takes too long") from error
    finally:
        os.close(source)
    if process.returncode:
        raise Unavailable(
            f"cannot fill volume {volume.parent.name}: {errors.decode(errors='replace').strip()}"
        )
