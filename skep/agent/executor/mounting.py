"""Mounts of a container: what of the wish is on this node, and new volumes filled from the image."""

import os
from collections.abc import Callable, Iterable, Sequence

import msgspec

from skep.agent.executor import wish
from skep.agent.executor.interface import Rejected
from skep.engine.bundle import Bundles
from skep.engine.container import Container, MountPoint
from skep.engine.mounts.volumes import Volumes, copy_up
from skep.model.container import Mount

NO_SOURCE = 'invalid mount config for type "bind": field Source must not be empty'


class Mounting:
    """Finds and makes what containers mount."""

    def __init__(self, volumes: Volumes, bundles: Bundles) -> None:
        self._volumes = volumes
        self._bundles = bundles

    def points(
        self, mounts: Iterable[Mount], image_volumes: Iterable[str], expand: Callable[[str], str] = str
    ) -> list[MountPoint]:
        """Where everything is; volumes are made if there are none.

        Args:
            image_volumes: places that the image wants a volume at; a nameless one, where ``mounts`` has nothing.
            expand: what a source means.

        Raises: Rejected, in Docker's words; InvalidArgument: no name for a volume.
        """
        points = [self._point(mount, expand) for mount in mounts]
        taken = {point.destination for point in points}
        nameless = sorted(set(image_volumes) - taken)
        return points + [self._point(Mount(type="volume", target=one), expand) for one in nameless]

    def _point(self, mount: Mount, expand: Callable[[str], str]) -> MountPoint:
        source = expand(mount.source)
        match mount.type:
            case "bind":
                if not source:
                    raise Rejected(NO_SOURCE)
                if not os.path.exists(source):
                    options = mount.bind_options
                    if options is None or not options.create_mountpoint:
                        raise Rejected(
                            f'invalid mount config for type "bind": bind source path does not exist: {source}'
                        )
                    os.makedirs(source)
                return wish.mount_point(mount, source, "")
            case "volume" | "":
                driver = mount.volume_options.driver_config if mount.volume_options else None
                if driver is not None and driver.name not in ("", "local"):
                    raise Rejected(
                        f'error looking up volume plugin {driver.name}: plugin "{driver.name}" not found'
                    )
                name = source or self._volumes.new_name()
                labels = mount.volume_options.labels if mount.volume_options and source else None
                path = self._volumes.ensure(name, labels or None)
                point = wish.mount_point(mount, str(path), name)
                return msgspec.structs.replace(point, anonymous=not source)
            case _:
                return wish.mount_point(mount, source, "")

    async def fill(self, container: Container, mounts: Sequence[Mount]) -> None:
        """New volumes begin with what the image has at their place, unless the wish says ``nocopy``."""
        unfilled = {mount.target for mount in mounts if mount.volume_options and mount.volume_options.no_copy}
        for point in container.config.mounts:
            if point.type == "volume" and point.destination not in unfilled:
                await copy_up(
                    self._bundles.rootfs(container.id), point.destination, self._volumes.path(point.name)
                )

    async def discard_nameless(self, points: Iterable[MountPoint]) -> None:
        """Remove the volumes that were made for one container alone."""
        for point in points:
            if point.type == "volume" and point.anonymous:
                await self._volumes.remove(point.name)
