"""Dockerfiles and ignore files, as a client or a remote context has them, and the builds that they define."""

import os
import stat
from pathlib import Path

import msgspec

from skep.engine.build.dockerfile.dockerfile import FILE_BYTES_MAX
from skep.engine.build.interface import BuildRequest
from skep.engine.buildkit.options import BuildOptions, Exported
from skep.errors import InvalidArgument, NotFound
from skep.linux.syscalls import open_in_root

IGNORE_FILE, IGNORE_BYTES_MAX = ".dockerignore", 1 << 20


class Definition(msgspec.Struct, frozen=True):
    """Dockerfile of a build.  ``ignored``: Content of its own ignore file (``Dockerfile.dockerignore``).

    None without one.
    """

    text: str
    ignored: str | None


def names_of(filename: str) -> tuple[str, ...]:
    """Return the names of the files to request from the client for a Dockerfile."""
    directory, _, name = filename.rpartition("/")
    names = [filename, f"{filename}{IGNORE_FILE}"]
    if name == "Dockerfile":
        names.append(f"{directory}/dockerfile" if directory else "dockerfile")
    return tuple(names)


def read_definition(root: Path, filename: str) -> Definition:
    """Read a Dockerfile and its ignore file.  Raises: NotFound, InvalidArgument."""
    *_, last = names_of(filename)
    text = read_in(root, filename, FILE_BYTES_MAX)
    if text is None and last != f"{filename}{IGNORE_FILE}":
        text = read_in(root, last, FILE_BYTES_MAX)
    if text is None:
        raise NotFound(f"failed to read dockerfile: open {filename}: no such file or directory")
    return Definition(text, read_in(root, f"{filename}{IGNORE_FILE}", IGNORE_BYTES_MAX))


def read_in(root: Path, name: str, bytes_max: int) -> str | None:
    """Return the text of a file, or None if it does not exist.  Its links cannot lead out of ``root``.

    Raises: InvalidArgument: it is too large.
    """
    try:
        descriptor = open_in_root(root, name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise InvalidArgument(f"{name} is larger than {bytes_max} bytes")
    return data.decode(errors="surrogateescape")


def build_request(
    build: BuildOptions, export: Exported, dockerfile: str, *, has_host_network: bool = False
) -> BuildRequest:
    """Return a build without its contexts, cache sources and platform."""
    return BuildRequest(
        dockerfile=dockerfile,
        tags=() if build.is_index else export.tags,
        target=build.target,
        arguments=build.arguments,
        labels=build.labels,
        use_cache=build.use_cache,
        stages_without_cache=build.stages_without_cache,
        images=build.images,
        pull=build.pull,
        network=build.network,
        hosts=build.hosts,
        limits=build.limits,
        has_host_network=has_host_network,
        hostname=build.hostname,
        cache_namespace=build.cache_namespace,
        epoch_s=build.epoch_s,
        rewrites_times=export.rewrites_times,
        is_buildkit=True,
    )
