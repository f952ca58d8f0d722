"""The image store of this node, with the operations that executor and Engine API use.

``LocalImages`` holds the images.  Here they are loaded, pulled, saved, pushed and removed.
"""

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from skep import __version__
from skep.aio.clock import Clock
from skep.engine.images.archives import archive
from skep.engine.images.archives.workers import ImageLimits
from skep.engine.images.catalog import with_references
from skep.engine.images.child import HistoryStep, child_config
from skep.engine.images.digest import Digest
from skep.engine.images.image import ContainerDefaults, Image, as_docker_writes
from skep.engine.images.local import ImageEvent, LocalImages
from skep.engine.images.platforms import ImagePlatform
from skep.engine.images.progress import Report, quiet
from skep.engine.images.reference import Reference, parse_reference, tagged
from skep.engine.images.registry import pulling, pushing
from skep.engine.images.registry.credentials import CredentialHelpers, RegistryCredentials, decode_credentials
from skep.engine.images.registry.endpoints import RegistryPolicy
from skep.engine.images.registry.registry import (
    Denied,
    NoCredentials,
    RegistryError,
    RegistryRepository,
    at_endpoints,
)
from skep.engine.images.removal import ImageUser, Users, ancestors_to_prune, removal
from skep.engine.images.sharing.spreading import NodeFetcher
from skep.errors import NotFound, PermissionDenied, SkepError
from skep.model.values.times import Timestamp, timestamp

T = TypeVar("T")

log = structlog.get_logger(__name__)


Chosen = tuple[Sequence[tuple[Digest, Reference]], Sequence[Image]]
"""Names to remove with the ids of their images, and images to remove."""


class Removed(msgspec.Struct, frozen=True):
    """Result of a removal: names, then images and layers by digest."""

    untagged: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


class ImageStore(LocalImages):
    """All images of this node."""

    def __init__(
        self,
        root: Path,
        *,
        policy: RegistryPolicy | None = None,
        nodes: NodeFetcher | None = None,
        limits: ImageLimits | None = None,
        clock: Clock | None = None,
        on_event: Callable[[ImageEvent], None] = lambda _: None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Args:
            policy: Rules for reaching registries (mirrors, insecure ones).
            nodes: Fetches images that no registry provides.

        For the other arguments see ``LocalImages``.
        """
        super().__init__(root, limits=limits, clock=clock, on_event=on_event, report=report)
        self.policy = policy or RegistryPolicy()
        self._nodes = nodes
        self._helpers = CredentialHelpers(self._clock)

    def named(self, word: str) -> Sequence[Image]:
        """Return the images with this name: the one for this machine, and then those for other platforms.

        Raises: InvalidArgument: it cannot be a name.
        """
        name, found = tagged(word), self.resolve(word)
        index = self.index(name) if name is not None else ()
        return list({image.id: image for image in (found, *index) if image is not None}.values())

    async def name_index(self, ids: Sequence[Digest], references: Sequence[Reference], here: Digest) -> None:
        """Move names to an index of images, one for each platform.  The names alone mean the image ``here``.

        Raises: NotFound: an image was removed meanwhile.
        """
        async with self._writing:
            for id in ids:
                if id not in self._images:
                    raise NotFound(f"No such image: {id}")
            catalog = with_references(self._catalog, references, here, tuple(ids))
            stamp = timestamp(self._clock.now_ns())
            steps, stamps = catalog.steps - set(ids), {**catalog.tagged_at, here: stamp}
            await self._put(msgspec.structs.replace(catalog, steps=steps, tagged_at=stamps))
        for reference in references:
            self.announce("tag", here, reference.familiar)

    async def load(
        self,
        pieces: AsyncIterable[bytes],
        report: Report = quiet,
        *,
        platforms: Sequence[ImagePlatform] = (),
    ) -> Sequence[Image]:
        """Load the images of an archive (``docker load``), as ``archive.load`` does."""
        return await archive.load(self, pieces, report, platforms)

    def save(
        self, words: Sequence[str], *, platforms: Sequence[ImagePlatform] = ()
    ) -> AsyncGenerator[bytes, None]:
        """Return an archive of the images ``words`` (``docker save``), as ``archive.save`` does."""
        return archive.save(self, words, platforms)

    async def pull(
        self,
        word: str,
        auth: str = "",
        report: Report = quiet,
        *,
        platform: str = "",
        aside: bool = False,
        uses_helper: bool = True,
    ) -> Image:
        """Pull an image from its registry.  Parts that are on this node already are not fetched again.

        An image that the registry does not provide, and that is not on this node, is fetched from a node of the cluster
        that has it.  If the registry denies access, only an image that came from no registry is accepted.

        Args:
            auth: ``X-Registry-Auth``: base64 of JSON.  Empty for none.
            platform: ``os[/architecture[/variant]]`` if the registry has several.  Empty for this machine's.
            aside: Whether the image gets only its digest as a name, so that the tag stays with another image.
            uses_helper: Whether the node's credential helpers may be used.  For users other than administrators, only
                if an administrator allows it.

        Raises:
            InvalidArgument: the reference or ``auth`` cannot be parsed.
            NotFound: the registry has no such image for this platform.
            PermissionDenied: the registry refuses access.
            Unavailable: the registry cannot be reached.
        """
        reference = parse_reference(word).with_default_tag()
        return await self._pull(reference, auth, report, pulling.Variety(platform, aside), uses_helper)

    async def pull_all(
        self, reference: Reference, auth: str, report: Report = quiet, *, platform: str = ""
    ) -> Sequence[Image]:
        """Pull like ``pull``.  A reference without tag and digest pulls every tag of its repository."""
        wanted = [reference]
        if reference.is_name_only:
            tags = await self._with_credentials(
                reference.domain,
                auth,
                lambda known: pulling.tags(self.policy, reference, known, self.limits),
            )
            wanted = [reference.with_tag(tag) for tag in tags]
        return [await self._pull(one, auth, report, pulling.Variety(platform), True) for one in wanted]

    async def _pull(
        self, reference: Reference, auth: str, report: Report, wanted: pulling.Variety, uses_helper: bool
    ) -> Image:
        try:
            return await self._with_credentials(
                reference.domain,
                auth,
                lambda known: pulling.pull(self, self.policy, reference, known, report, wanted),
                uses_helper=uses_helper,
            )
        except SkepError as error:
            if self._nodes is None or self.resolve(str(reference)) is not None:
                raise
            try:
                # An image that the registry denies to this caller must not come from another node.
                is_denied = isinstance(error, Denied | PermissionDenied | NoCredentials)
                return await pulling.pull_from_nodes(
                    self, self._nodes, reference, report, wanted, only_own=is_denied
                )
            except SkepError as other:
                log.info("image not fetched from a node", image=reference.familiar, reason=str(other))
                raise error from other

    async def inspect_remote(
        self, reference: Reference, auth: str, *, uses_helper: bool = True
    ) -> Mapping[str, Any]:
        """Return a registry's description of a name, as ``pulling.inspect`` does.

        If the registry cannot be reached, return the description from the registry's documents that came with the image
        on this node.  A service is then pinned to that digest, so that all its nodes run the same image, which they
        fetch from each other.
        """
        try:
            return await self._with_credentials(
                reference.domain,
                auth,
                lambda known: pulling.inspect(self.policy, reference, known, self.limits),
                uses_helper=uses_helper,
            )
        except RegistryError:
            found = await pulling.inspect_here(self, reference)
            if found is None:
                raise
            return found

    async def at_registry(
        self,
        reference: Reference,
        auth: str,
        action: Callable[[RegistryRepository], Awaitable[T]],
        *,
        to_push: bool = False,
    ) -> T:
        """Return the result of ``action`` with a repository of a registry.  Raises: as ``at_endpoints``."""
        return await self._with_credentials(
            reference.domain,
            auth,
            lambda known: at_endpoints(self.policy, reference, known, action, to_push=to_push),
        )

    async def push(self, reference: Reference, auth: str, report: Report = quiet) -> None:
        """Push an image, or all tags of a repository, to its registry.  Raises: as ``pushing.push``."""
        credentials = await self._credentials_to_push(reference.domain, auth)
        await pushing.push(self, self.policy, reference, credentials, report)

    async def push_image(
        self, image_id: Digest, tag: Reference, auth: str, index: Sequence[Digest] = ()
    ) -> Digest:
        """Push an image under a tag, whatever the tag names here, and return the digest of its manifest or index.

        ``index``: Images for several platforms to push as an index.

        Raises: NotFound: an image was removed; as ``pushing.push``.
        """
        image = pushing.PushedImage(self.get(image_id), tuple(self.get(id) for id in index))
        credentials = await self._credentials_to_push(tag.domain, auth)
        return await pushing.push_image(self, self.policy, image, tag, credentials)

    async def _credentials_to_push(self, domain: str, auth: str) -> RegistryCredentials:
        credentials, helper = _credentials_for(domain, auth), self.policy.helpers.get(domain)
        if not credentials and helper:
            credentials = (await self._helpers.provide(helper, domain)).credentials
        return credentials

    async def _with_credentials(
        self,
        domain: str,
        auth: str,
        action: Callable[[RegistryCredentials], Awaitable[T]],
        *,
        uses_helper: bool = True,
    ) -> T:
        """Run ``action`` with the client's credentials, or with the helper's if they are missing or refused.

        A service's credentials may have expired long ago.
        """
        known, helper = _credentials_for(domain, auth), self.policy.helpers.get(domain)
        if not helper or not uses_helper:
            return await action(known)
        if known:
            try:
                return await action(known)
            except (Denied, PermissionDenied) as error:
                log.info("credentials refused, trying the node's", registry=domain, reason=str(error))
        provided = await self._helpers.provide(helper, domain)
        try:
            return await action(provided.credentials)
        except (Denied, PermissionDenied, NoCredentials) as error:
            if provided.is_kept:
                provided = await self._helpers.provide(helper, domain, fresh=True)
                if not provided.problem:
                    return await action(provided.credentials)
            if provided.problem:
                raise Denied(f"{error} ({provided.problem})", str(error)) from error
            raise

    async def remove(self, word: str, *, force: bool = False, prune: bool = True, users: Users) -> Removed:
        """Untag or delete an image (``docker rmi``).

        ``prune`` also removes parents that are no longer needed.

        Raises: NotFound; Conflict: the image is needed.
        """

        def choose() -> Chosen:
            image = self.resolve(word) or self.damaged(word) or self.get(word)
            present = users()
            decided = removal(word, image, force=force, users=present, children=self.children(image.id))
            gone = [image] if decided.image_id else []
            if gone and prune:
                gone += ancestors_to_prune(image, self.images(), present)
            return [(image.id, name) for name in decided.untagged], gone

        return await self._take(choose, users)

    async def prune(self, is_chosen: Callable[[Image], bool], *, users: Users) -> tuple[Removed, int]:
        """Delete the chosen images that are unused, and parents that are no longer needed.

        Returns the removed names and images, and the number of freed bytes.
        """

        def choose() -> Chosen:
            present = users()
            used = {user.image_id for user in present}
            left = {image.id: image for image in self.images()}
            gone: list[Image] = []
            for image in tuple(left.values()):
                if image.id in used or image.is_member or self.children(image.id) or not is_chosen(image):
                    continue
                needless = ancestors_to_prune(image, tuple(left.values()), present)
                gone += [left.pop(one.id) for one in (image, *needless)]
            return [(image.id, reference) for image in gone for reference in image.references], gone

        before = self.bytes_used()
        removed = await self._take(choose, users)
        return removed, before - self.bytes_used()

    def bytes_used(self) -> int:
        """Return the unpacked size of all layers."""
        return sum(layer.size_bytes for layer in self.layer_store.all().values())

    async def _take(self, choose: Callable[[], Chosen], users: Users) -> Removed:
        def in_use() -> Collection[str]:
            return {user.image_id for user in users()}

        async with self._writing:  # names and containers may change until the lock is held
            names, gone = choose()
            gone = [*gone, *self._without_index({name for _, name in names}, gone, users())]
            ids = [image.id for image in gone]
            await self._discard({name for _, name in names}, ids, in_use)
        layers = await self._collect()
        for id, _ in names:
            self.announce("untag", id, id)  # as in Docker, the event does not have the name
        for id in ids:
            self.announce("delete", id, id)
        return Removed(tuple(name.familiar for _, name in names), (*ids, *layers))

    def _without_index(
        self, names: Collection[Reference], gone: Sequence[Image], present: Collection[ImageUser]
    ) -> Sequence[Image]:
        """Return the images for other platforms that only ``names`` include, and their unneeded parents."""
        members = {
            one.id: one for name in names for one in self.index(name) if one.is_member and one not in gone
        }
        kept = {
            one.id
            for image in self.images()
            for name in image.tags
            if name not in names
            for one in self.index(name)
        }
        kept |= {Digest(user.image_id) for user in present}
        found: list[Image] = []
        for id, image in members.items():
            if id in kept or self.children(id):
                continue
            away = {one.id for one in (*gone, *found)}
            left = [one for one in self.images() if one.id not in away]
            found += [image, *ancestors_to_prune(image, left, present)]
        return found


def _credentials_for(domain: str, header: str) -> RegistryCredentials:
    """Return the credentials in ``X-Registry-Auth`` that may be sent to the registry ``domain``."""
    given = decode_credentials(header)
    known = given.for_registry(domain)
    if given and not known:
        log.info("credentials not used: they are for another registry", registry=domain)
    return known


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
    """Make an image with one layer from the tar of a file system, compressed or not (``docker import``).

    Source: moby 20.10, daemon/images/image_import.go.

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
