"""The images that a build starts from, copies from and produces."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial

import msgspec

from skep.engine.build.dockerfile.targets import parse_epoch
from skep.engine.build.inputs import Inputs
from skep.engine.build.interface import BuildRequest, BuildStep, Progress
from skep.engine.build.stage import StepImage
from skep.engine.images import child
from skep.engine.images.digest import Digest, is_digest
from skep.engine.images.image import Image
from skep.engine.images.platforms import ImagePlatform, best_for, is_for, platform_in, this_platform
from skep.engine.images.reference import parse_reference, tagged
from skep.engine.images.registry.pulling import pulled_aside
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, SkepError
from skep.model.values.times import SECOND_NS, timestamp


class Bases:
    """Images of one build.  They stay usable until ``stack`` is closed."""

    def __init__(
        self,
        images: ImageStore,
        request: BuildRequest,
        inputs: Inputs,
        progress: Progress,
        stack: AsyncExitStack,
    ) -> None:
        self.images = images
        self.request = request
        self._inputs = inputs
        self.progress = progress
        self._stack = stack
        self._pin: Callable[[Digest], None] | None = None
        self._pinned: set[Digest] = set()

    async def pin(self, chain: Sequence[Digest]) -> None:
        """Keep layers for the rest of the build, whether they exist already or not."""
        if self._pin is None:
            # One pin for all layers, because the store searches for unneeded layers after each release.
            self._pin = await self._stack.enter_async_context(self.images.pinning())
        for chain_id in chain:
            if chain_id not in self._pinned:
                self._pinned.add(chain_id)
                self._pin(chain_id)

    async def pull(self, step: BuildStep, name: str, platform: ImagePlatform | None) -> StepImage:
        """Return the image with this name.  Pull it if this node does not have it.

        ``platform``: Platform that the build names.  None if it names none.

        Raises: SkepError; InvalidArgument: no image with this name is for the platform.
        """
        word = name
        if self.request.is_buildkit and name.isdigit():  # FROM 0 is an image, not the first digit of an id
            word = str(parse_reference(name).with_default_tag())
        present = self.images.resolve(word)
        found = present if platform is None else await self._present(word, platform)
        if found is None and is_digest(name) and present is not None:
            found = present
        elif found is None or (self.request.pull and not is_digest(name)):  # no registry has an id
            reference = parse_reference(name).with_default_tag()
            auth = await self._inputs.credentials(self.request, reference.domain)
            try:
                found = await self.images.pull(
                    str(reference),
                    auth,
                    partial(self.progress.pulling, step),
                    platform=str(platform or ""),
                    aside=_is_aside(present, platform),
                )
            except SkepError as error:
                if present is None or platform is None:
                    raise
                shown = platform_in(present.config)
                raise InvalidArgument(
                    f"base image {name} is here for {shown}, not {platform}: {error}"
                ) from error
        if platform is not None and not is_for(found.config, platform):
            shown = platform_in(found.config)
            raise InvalidArgument(f"base image {name} is for {shown}, and not for {platform}")
        return await self.keep(found)

    async def _present(self, word: str, platform: ImagePlatform) -> Image | None:
        """Return the image on this node that has this name and is for the platform."""
        found = best_for(self.images.named(word), platform)
        name = tagged(word)
        if found is None and name is not None:
            found = await pulled_aside(self.images, name, platform)
        return found

    async def keep(self, image: Image) -> StepImage:
        """Keep an image for the rest of the build.  Raises: NotFound, OSError: it was removed meanwhile."""
        chain = tuple(image.chain)
        await self.pin(chain)
        content = self.images.config_file(image).read_bytes()
        return StepImage(id=image.id, content=content, config=image.config, chain=chain, link=image.id)

    async def limit_times(self, made: StepImage, inherited: int, arguments: Mapping[str, str]) -> StepImage:
        """Return the image with all times limited to ``SOURCE_DATE_EPOCH``.

        Args:
            inherited: Number of history entries from before the build, which keep their times.
            arguments: Global arguments, which may set the epoch if the client does not.

        Images of steps keep the times of the steps, so a new ``SOURCE_DATE_EPOCH`` alone invalidates no cached step.
        """
        epoch_s = self.request.epoch_s
        if epoch_s is None and self.request.is_buildkit:
            epoch_s = parse_epoch(arguments.get("SOURCE_DATE_EPOCH", ""))
        if epoch_s is None:
            return made
        content = child.not_newer(made.content, timestamp(epoch_s * SECOND_NS), inherited)
        if content == made.content:
            return made
        return await self._with_config(made, content)

    async def add_cache(self, made: StepImage, cache: bytes) -> StepImage:
        """Return the image with the steps of the build in its configuration (``--cache-to type=inline``)."""
        return await self._with_config(made, child.with_cache(made.content, cache))

    async def _with_config(self, made: StepImage, content: bytes) -> StepImage:
        image = await self.images.add(content, parent=made.id, is_step=True)
        return msgspec.structs.replace(made, id=image.id, content=content, config=image.config)


def _is_aside(present: Image | None, platform: ImagePlatform | None) -> bool:
    """Return whether a pull for a platform leaves the tag alone, which names another image or is this machine's."""
    if platform is None:
        return False
    is_here = platform.architecture == this_platform().architecture
    return not is_here or (present is not None and not is_for(present.config, platform))
