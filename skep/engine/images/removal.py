"""Decides what ``docker rmi`` removes.

The images, the containers and the request determine the removal, or the refusal in Docker's words.  Running containers
and children always prevent a removal.  Stopped containers and further names only do so without force.

Source: moby 20.10, daemon/images/image_delete.go.
"""

from collections.abc import Callable, Collection, Sequence

import msgspec

from skep.engine.images.digest import hex_of, short
from skep.engine.images.image import Image
from skep.engine.images.reference import Reference, parse_reference
from skep.errors import AlreadyExists


class Conflict(AlreadyExists):
    """The image is still needed.  The Engine API responds with 409, as for a name in use."""


class ImageUser(msgspec.Struct, frozen=True):
    """A container that was created from an image."""

    container_id: str
    image_id: str
    is_running: bool


Users = Callable[[], Collection[ImageUser]]
"""Returns every container of this node, as a user of its image."""


class Removal(msgspec.Struct, frozen=True):
    """Names and image to remove.  If ``image_id`` is empty, only names are removed."""

    untagged: tuple[Reference, ...] = ()
    image_id: str = ""


def removal(
    word: str, image: Image, *, force: bool, users: Collection[ImageUser], children: Sequence[Image]
) -> Removal:
    """Return what ``docker rmi word`` removes, where ``word`` names ``image``.

    If the image has other names, only the name is removed.  With its last name, the image is removed too, if it is not
    needed.

    Raises:
        Conflict: the image is needed.
    """
    using = [user for user in users if user.image_id == image.id]
    if image.id.startswith(word) or hex_of(image.id).startswith(word):
        conflict = _conflict(image, force, using, children, by_name=False)
        if conflict is not None:
            raise conflict
        return Removal(image.references, image.id)
    if not force and using and _is_single(image.references):
        raise Conflict(
            f'conflict: unable to remove repository reference "{word}" (must force) - container '
            f"{short(using[0].container_id)} is using its referenced image {short(image.id)}"
        )
    named = parse_reference(word).with_default_tag()
    if named.digest:
        named = named.with_digest(named.digest)
    untagged = [named]
    remaining = [reference for reference in image.references if reference != named]
    if not named.digest and not any(one.tag and one.name == named.name for one in remaining):
        # Removing the repository's last tag also removes its digests.
        untagged += [one for one in remaining if one.name == named.name]
        remaining = [one for one in remaining if one.name != named.name]
    if remaining or _conflict(image, force, using, children, by_name=True) is not None:
        return Removal(tuple(untagged))
    return Removal(tuple(untagged), image.id)


def ancestors_to_prune(
    image: Image, images: Sequence[Image], users: Collection[ImageUser]
) -> Sequence[Image]:
    """Return the parents that are no longer needed once ``image`` is removed, nearest first."""
    by_id: dict[str, Image] = {one.id: one for one in images}
    used = {user.image_id for user in users}
    gone = {image.id}
    found = []
    parent = by_id.get(image.parent)
    while parent is not None:
        children = [one for one in images if one.parent == parent.id and one.id not in gone]
        if parent.references or children or parent.id in used:
            break
        found.append(parent)
        gone.add(parent.id)
        parent = by_id.get(parent.parent)
    return found


def _conflict(
    image: Image, force: bool, using: Sequence[ImageUser], children: Sequence[Image], *, by_name: bool
) -> Conflict | None:
    """Return the reason why the image must stay, or None.  ``by_name`` ignores the image's other names."""
    if children:
        return _cannot_be_forced(image, "image has dependent child images")
    running = next((user for user in using if user.is_running), None)
    if running is not None:
        container = short(running.container_id)
        return _cannot_be_forced(image, f"image is being used by running container {container}")
    if force:
        return None
    if not by_name and image.references and not _is_single(image.references):
        return _must_be_forced(image, "image is referenced in multiple repositories")
    if using:
        container = short(using[0].container_id)
        return _must_be_forced(image, f"image is being used by stopped container {container}")
    return None


def _cannot_be_forced(image: Image, reason: str) -> Conflict:
    return Conflict(f"conflict: unable to delete {short(image.id)} (cannot be forced) - {reason}")


def _must_be_forced(image: Image, reason: str) -> Conflict:
    return Conflict(f"conflict: unable to delete {short(image.id)} (must be forced) - {reason}")


def _is_single(references: Sequence[Reference]) -> bool:
    """Return whether all names are in one repository, with at most one tag.  False without any."""
    tags = [reference for reference in references if reference.tag]
    return (
        bool(references) and len(tags) <= 1 and len({reference.repository for reference in references}) == 1
    )
