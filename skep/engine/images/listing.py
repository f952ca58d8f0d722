"""Which images ``docker images`` and ``docker image prune`` mean.

Pure: from all images and a wish follows the selection.

Source: moby 20.10, daemon/images/images.go, daemon/images/image_prune.go.
"""

from collections.abc import Callable, Sequence

import msgspec

from skep.engine.images.image import Image
from skep.engine.images.reference import Reference, matches
from skep.errors import InvalidArgument
from skep.model.times import ZERO_TIME, unix_ns


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for.  ``dangling`` None: both; ``labels`` and ``without_labels``: ``name`` or ``name=value``."""

    all: bool = False
    dangling: bool | None = None
    labels: tuple[str, ...] = ()
    without_labels: tuple[str, ...] = ()
    before: Image | None = None
    since: Image | None = None
    until_ns: int | None = None
    patterns: tuple[str, ...] = ()


class Listed(msgspec.Struct, frozen=True):
    """An image with those of its references that were asked for."""

    image: Image
    references: tuple[Reference, ...]


def created_ns(image: Image) -> int:
    """When the image was made, Unix time; what is no time counts as Go's zero time."""
    try:
        return unix_ns(image.created)
    except InvalidArgument:
        return unix_ns(ZERO_TIME)


def select(images: Sequence[Image], wish: Wish) -> Sequence[Listed]:
    """The images that ``wish`` asks for, the newest first.

    Without ``all``, an untagged image that others stand on is left out: it is a step of their build.
    """
    parents = {image.parent for image in images}
    found = []
    for image in images:
        if not _suits(image, wish):
            continue
        references = tuple(
            reference
            for reference in image.references
            if not wish.patterns or any(matches(pattern, reference) for pattern in wish.patterns)
        )
        if references:
            if wish.dangling and image.tags:
                continue
        elif wish.patterns or wish.dangling is False or (image.id in parents and not wish.all):
            continue
        found.append(Listed(image, references))
    return sorted(found, key=lambda listed: created_ns(listed.image), reverse=True)


def prunable(wish: Wish) -> Callable[[Image], bool]:
    """Which images ``docker image prune`` may take, if nothing uses them.

    ``dangling`` False: any; else only those without a tag.
    """
    return lambda image: _suits(image, wish) and not (wish.dangling is not False and image.tags)


def _suits(image: Image, wish: Wish) -> bool:
    created = created_ns(image)
    labels = image.config.defaults.labels or {}

    def has(label: str) -> bool:
        name, equals, value = label.partition("=")
        return name in labels and (not equals or labels[name] == value)

    return (
        (wish.before is None or created < created_ns(wish.before))
        and (wish.since is None or created > created_ns(wish.since))
        and (wish.until_ns is None or created < wish.until_ns)
        and all(map(has, wish.labels))
        and not any(map(has, wish.without_labels))
    )
