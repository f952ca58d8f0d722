"""Selects the images that ``docker images`` shows and ``docker image prune`` removes.  Pure.

Source: moby 20.10, daemon/images/images.go, daemon/images/image_prune.go.
"""

from collections.abc import Callable, Container, Sequence

import msgspec

from skep.engine.images.image import Image
from skep.engine.images.reference import Reference, matches
from skep.errors import InvalidArgument
from skep.model.values.times import ZERO_TIME, unix_ns


class ImageFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Filters of a request.

    Args:
        dangling: Whether to select images without a tag (True) or with a tag (False).  None selects both.
        labels: ``name`` or ``name=value``.  An image matches if it has all of ``labels``, and not all of
            ``without_labels``.
        without_labels: ``name`` or ``name=value``.  An image matches if it has all of ``labels``, and not all of
            ``without_labels``.
    """

    all: bool = False
    dangling: bool | None = None
    labels: tuple[str, ...] = ()
    without_labels: tuple[str, ...] = ()
    before: Image | None = None
    since: Image | None = None
    until_ns: int | None = None
    patterns: tuple[str, ...] = ()


class Listed(msgspec.Struct, frozen=True):
    """Image with its matching references."""

    image: Image
    references: tuple[Reference, ...]


def created_ns(image: Image) -> int:
    """Return the Unix time of the image's creation.  An invalid time counts as Go's zero time."""
    try:
        return unix_ns(image.created)
    except InvalidArgument:
        return unix_ns(ZERO_TIME)


def select(images: Sequence[Image], filter: ImageFilter) -> Sequence[Listed]:
    """Return the images that match ``filter``, the newest first.

    Without ``all``, untagged build steps are left out: parents of other images, and images of BuildKit's stages.
    """
    parents = {image.parent for image in images}
    found = []
    for image in images:
        if not _matches(image, filter):
            continue
        references = tuple(
            reference
            for reference in image.references
            if not filter.patterns or any(matches(pattern, reference) for pattern in filter.patterns)
        )
        if references:
            if filter.dangling and image.tags:
                continue
        elif filter.patterns or filter.dangling is False or (_is_step(image, parents) and not filter.all):
            continue
        found.append(Listed(image, references))
    return sorted(found, key=lambda listed: created_ns(listed.image), reverse=True)


def _is_step(image: Image, parents: Container[str]) -> bool:
    return image.is_step or image.is_member or image.id in parents


def prunable(filter: ImageFilter) -> Callable[[Image], bool]:
    """Return a function that tells whether ``docker image prune`` may remove an image if it is not in use.

    If the filter ``dangling`` is False, it may remove any image, and otherwise only images without a tag.
    """
    return lambda image: _matches(image, filter) and not (filter.dangling is not False and image.tags)


def _matches(image: Image, filter: ImageFilter) -> bool:
    created = created_ns(image)
    labels = image.config.defaults.labels or {}

    def has(label: str) -> bool:
        name, equals, value = label.partition("=")
        return name in labels and (not equals or labels[name] == value)

    return (
        (filter.before is None or created < created_ns(filter.before))
        and (filter.since is None or created > created_ns(filter.since))
        and (filter.until_ns is None or created < filter.until_ns)
        and all(map(has, filter.labels))
        and not (filter.without_labels and all(map(has, filter.without_labels)))
    )
