"""Mounts images in containers (``--mount type=image``): the image's layers below a writable directory of the container.

All containers with the image share its layers.  The changes belong to the container and are removed with it.  It is
also possible to mount a single file or directory of the image.  Links in the image cannot lead outside.
Source: moby 28, daemon/volumes.go, volume/mounts/linux_parser.go.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from skep.engine.containers.container import Container, MountPoint
from skep.engine.images.digest import Digest
from skep.engine.images.store import ImageStore
from skep.engine.runtime import overlay
from skep.engine.volumes.mounts import check_subpath
from skep.errors import FailedPrecondition, InvalidArgument
from skep.linux import mounting, syscalls
from skep.model.container import Mount

_TYPE = "image"


def image_points(images: ImageStore, mounts: Sequence[Mount]) -> list[MountPoint]:
    """Return the image mounts among ``mounts``.

    Raises: InvalidArgument; NotFound: the image is not on this node.
    """
    for mount in mounts:
        if mount.type != _TYPE and mount.image_options is not None:
            raise InvalidArgument(
                f'invalid mount config for type "{mount.type}": field ImageOptions must not be specified'
            )
    return [_point(images, mount) for mount in mounts if mount.type == _TYPE]


def others(mounts: Iterable[Mount]) -> list[Mount]:
    """Return the ``mounts`` that are not image mounts."""
    return [mount for mount in mounts if mount.type != _TYPE]


def _point(images: ImageStore, mount: Mount) -> MountPoint:
    invalid = f'invalid mount config for type "{_TYPE}"'
    for name in ("bind_options", "volume_options", "tmpfs_options"):
        if getattr(mount, name) is not None:
            field = "".join(map(str.capitalize, name.split("_")))
            raise InvalidArgument(f"{invalid}: field {field} must not be specified")
    if not mount.source:
        raise InvalidArgument(f"{invalid}: field Source must not be empty")
    subpath = mount.image_options.subpath if mount.image_options is not None else ""
    check_subpath(_TYPE, subpath)
    image = images.get(mount.source)
    return MountPoint(
        type=_TYPE,
        destination=mount.target,
        name=image.id,
        read_only=mount.read_only,
        subpath=subpath,
        layers=tuple(map(str, images.layers(image))),
    )


def chains(images: ImageStore, points: Iterable[MountPoint]) -> list[Digest]:
    """Return the layers of the images that ``points`` mount.  Raises: NotFound."""
    return [id for point in points if point.type == _TYPE for id in images.get(point.name).chain]


def images_of(container: Container) -> Sequence[str]:
    """Return the ids of a container's images: its own, unless it runs a program of the machine, and mounted ones."""
    own = [container.image_id] if container.image_id else []
    return [*own, *(point.name for point in container.config.mounts if point.type == _TYPE)]


def placed(point: MountPoint, number: int, place: Path) -> MountPoint:
    """Return ``point`` for runc, with its source replaced by the path at which ``mount_all`` mounts the image."""
    source = _part(place, number) if point.subpath else place / str(number)
    return MountPoint(
        type="bind",
        destination=point.destination,
        source=str(source),
        read_only=point.read_only,
        internal=True,
    )


def _part(place: Path, number: int) -> Path:
    return place / f"{number}.part"


def mount_all(container: Container, place: Path, changes: Path) -> None:
    """Mount the images among the container's mounts, each by its number below ``place``.  Idempotent.

    ``changes`` is a directory that the container keeps.

    Raises: OSError; FailedPrecondition: too many layers, or an image does not have the subpath.
    """
    users, label = container.users, container.config.mount_label
    for number, point in enumerate(container.config.mounts):
        target, own = place / str(number), changes / str(number)
        if point.type != _TYPE:
            continue
        if not os.path.ismount(target):
            for directory in (target, own / "upper", own / "work", own / "empty"):
                directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            layers = [Path(layer) for layer in point.layers] or [own / "empty"]
            overlay.mount_layers(layers, own / "upper", own / "work", target, users, label)
        if point.subpath and not mounting.is_target(part := _part(place, number)):
            try:
                mounting.bind_part(str(target), point.subpath, part)
            except mounting.KernelMountFailed as error:
                raise FailedPrecondition(str(error)) from error


def unmount_all(place: Path) -> None:
    """Undo ``mount_all``.  Raises: OSError."""
    if place.is_dir():
        for target in place.iterdir():
            syscalls.unmount_if_mounted(target)
