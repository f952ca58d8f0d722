"""``docker import``: an image with one layer, from the tar of a file system.

Source: moby 20.10, daemon/images/image_import.go.
"""

from collections.abc import AsyncIterable

import msgspec

from skep import __version__
from skep.engine.images.child import HistoryStep, child_config
from skep.engine.images.image import ContainerDefaults, Image, as_docker_writes
from skep.engine.images.platforms import ImagePlatform
from skep.engine.images.reference import Reference
from skep.engine.images.store import ImageStore
from skep.model.values.times import Timestamp


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Request of ``docker import``, without the archive.

    ``config`` has default options for containers of the image.
    """

    reference: Reference | None
    comment: str
    config: ContainerDefaults
    platform: ImagePlatform


async def import_tree(
    images: ImageStore, archive: AsyncIterable[bytes], request: ImportRequest, now: Timestamp
) -> Image:
    """Make an image from a tar, compressed or not.

    Raises: InvalidArgument: it is not a tar; ResourceExhausted; UnpackFailed.
    """
    platform = {"os": request.platform.os, "architecture": request.platform.architecture}
    if request.platform.variant:
        platform["variant"] = request.platform.variant
    async with images.layer_of_archive(archive) as layer:
        content = child_config(
            None,
            HistoryStep(created=now, diff_id=layer.diff_id, comment=request.comment),
            as_docker_writes(request.config),
            more={"docker_version": __version__},
            platform=platform,
        )
        references = [request.reference] if request.reference is not None else []
        image = await images.add(content, references, is_tagged=bool(references))
    if request.reference is not None:
        images.announce("tag", image.id, request.reference.familiar)
    images.announce("import", image.id, image.id)
    return image
