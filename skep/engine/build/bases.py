"""Images that a build starts from, copies from, or results in."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial

from skep.engine.build.inputs import Inputs
from skep.engine.build.interface import BuildRequest, Progress, Step
from skep.engine.build.stage import Made
from skep.engine.build.targets import parse_epoch
from skep.engine.images import child
from skep.engine.images.digest import is_digest
from skep.engine.images.image import Image
from skep.engine.images.reference import parse_reference
from skep.engine.images.store import ImageStore
from skep.model.times import SECOND_NS, timestamp


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
        self._images = images
        self._request = request
        self._inputs = inputs
        self._progress = progress
        self._stack = stack

    async def pulled(self, step: Step, name: str) -> Made:
        """Return the image with this name, from a registry if it is not here.  Raises: SkepError."""
        word = name
        if self._request.is_buildkit and name.isdigit():  # FROM 0 is an image, not the first digit of an id
            word = str(parse_reference(name).with_default_tag())
        found = self._images.resolve(word)
        if found is None or (self._request.pull and not is_digest(name)):  # no registry has an id
            reference = parse_reference(name).with_default_tag()
            auth = await self._inputs.credentials(self._request, reference.domain)
            report = partial(self._progress.pulling, step)
            found = await self._images.pull(str(reference), auth, report, platform=self._request.platform)
        return await self.usable(found)

    async def usable(self, image: Image) -> Made:
        """Keep an image for the rest of the build.  Raises: NotFound, OSError: it was removed just now."""
        await self._stack.enter_async_context(self._images.pinned(image.chain))
        content = self._images.config_file(image).read_bytes()
        return Made(id=image.id, content=content, config=image.config, chain=tuple(image.chain))

    async def not_newer(self, made: Made, inherited: int, arguments: Mapping[str, str]) -> Made:
        """Return the image with all times limited to ``SOURCE_DATE_EPOCH``.

        Args:
            inherited: Number of history entries from before the build, which keep their times.
            arguments: Global arguments: one of them may set the epoch if the client does not.

        Images of steps keep the times of the steps, so a new ``SOURCE_DATE_EPOCH`` alone invalidates no cached step.
        """
        epoch_s = self._request.epoch_s
        if epoch_s is None and self._request.is_buildkit:
            epoch_s = parse_epoch(arguments.get("SOURCE_DATE_EPOCH", ""))
        if epoch_s is None:
            return made
        content = child.not_newer(made.content, timestamp(epoch_s * SECOND_NS), inherited)
        if content == made.content:
            return made
        image = await self._images.add(content, parent=made.id, is_step=True)
        return Made(id=image.id, content=content, config=image.config, chain=made.chain)
