"""Writes image archives for ``docker load``, without an image tool and without a registry.

The same files produce the same bytes, and so the same image id, on every machine and in every run: entries are sorted,
owners are root, times are fixed.
"""

import hashlib
import io
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from skep.errors import Unimplemented

_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
}


class File(msgspec.Struct, frozen=True):
    """A regular file of an image."""

    content: bytes
    mode: int = 0o644


class SymbolicLink(msgspec.Struct, frozen=True):
    """A symbolic link of an image."""

    target: str


class ArchivedDirectory(msgspec.Struct, frozen=True):
    """A directory of an image.  Parents of files need not be listed."""

    mode: int = 0o755


Entry = File | SymbolicLink | ArchivedDirectory


class Archive(msgspec.Struct, frozen=True):
    """A finished archive and the id of its image."""

    image_id: str
    data: bytes


def image_archive(
    entries: Mapping[str, Entry], *, tags: Sequence[str], created: str, config: Mapping[str, object]
) -> Archive:
    """Return an image with one layer.

    Args:
        entries: Entries by path below the root, without a leading slash.
        created: RFC 3339 time, which is part of the image id.
        config: Docker's container configuration: Cmd, Env, StopSignal, ...
    """
    layer = _tar(_with_parents(entries))
    diff_id = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    history = [{"created": created, "created_by": "skep playground"}]
    description = {
        "architecture": architecture(),
        "config": config,
        "created": created,
        "history": history,
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }
    encoded = msgspec.json.encode(description, order="sorted")
    digest = hashlib.sha256(encoded).hexdigest()
    layer_name = f"{diff_id.removeprefix('sha256:')}/layer.tar"
    manifest = [{"Config": f"{digest}.json", "RepoTags": list(tags), "Layers": [layer_name]}]
    outer = {
        f"{digest}.json": File(encoded),
        layer_name: File(layer),
        "manifest.json": File(msgspec.json.encode(manifest)),
    }
    return Archive(f"sha256:{digest}", _tar(outer))


def architecture() -> str:
    """Return this machine's architecture in the spelling of images.  Raises: Unimplemented."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise Unimplemented(f"images cannot be built for the architecture {machine}")
    return _ARCHITECTURES[machine]


def _with_parents(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return ``entries`` and every directory above them."""
    complete = dict(entries)
    for name in entries:
        for parent in Path(name).parents:
            if parent != Path():
                complete.setdefault(str(parent), ArchivedDirectory())
    return complete


def _tar(entries: Mapping[str, Entry]) -> bytes:
    """Return a tar archive, sorted by path, so that a directory precedes its contents."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(entries):
            information = tarfile.TarInfo(name)
            match entries[name]:
                case File(content, mode):
                    information.mode, information.size = mode, len(content)
                    tar.addfile(information, io.BytesIO(content))
                case SymbolicLink(target):
                    information.type, information.linkname, information.mode = tarfile.SYMTYPE, target, 0o777
                    tar.addfile(information)
                case ArchivedDirectory(mode):
                    information.type, information.mode = tarfile.DIRTYPE, mode
                    tar.addfile(information)
    return output.getvalue()
