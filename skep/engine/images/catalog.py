"""Catalog of a node's images: names, parents and times, in one file."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from skep.aio.failures import log_error
from skep.aio.trees import discard_tree_now
from skep.engine.images.digest import Digest
from skep.engine.images.reference import Reference, parse_reference
from skep.errors import InvalidArgument
from skep.linux.files import is_no_file
from skep.model.values.times import Timestamp


class Catalog(msgspec.Struct, frozen=True):
    """Data of images beyond their configurations.

    Args:
        references: Image ids by reference.
        tagged_at: Time of the last tag by a user, by image id.
        parents: Parent image, by image id.
        retired: Removed images whose layers are still used by containers.  They are not shown.
        fetched: Images from a registry or another node that no user has loaded or tagged.
        steps: Intermediate images of builds by BuildKit's protocol that are not the result of any build.
        indexes: Images of a build for several platforms in their order, by reference.  The reference itself names the
            one for this machine.
    """

    references: Mapping[str, Digest] = {}
    tagged_at: Mapping[str, Timestamp] = {}
    parents: Mapping[str, str] = {}
    retired: frozenset[str] = frozenset()
    fetched: frozenset[str] = frozenset()
    steps: frozenset[str] = frozenset()
    indexes: Mapping[str, tuple[Digest, ...]] = {}

    @property
    def members(self) -> frozenset[str]:
        """Images of all indexes."""
        return frozenset(id for ids in self.indexes.values() for id in ids)


def read_catalog(file: Path) -> Catalog:
    """Read the catalog of an earlier process.

    If the file is damaged, it is moved aside, and all images lose their names.

    Raises: OSError: it cannot be read now.
    """
    try:
        catalog = msgspec.json.decode(file.read_bytes(), type=Catalog)
        for text in catalog.references:
            parse_reference(text)
    except FileNotFoundError:
        return Catalog()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, InvalidArgument) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise
        aside = file.with_suffix(".damaged")
        log_error(error, "image names lost: catalog is damaged", file=str(file), kept_as=str(aside))
        discard_tree_now(aside)
        with suppress(OSError):
            file.rename(aside)
        return Catalog()
    return catalog


def with_image(
    catalog: Catalog, id: Digest, *, parent: str, is_fetched: bool, is_step: bool, tagged_at: Timestamp
) -> Catalog:
    """Return the catalog with the image ``id``, which may be in it already.

    If ``parent`` or ``tagged_at`` is empty, the earlier value stays.
    """
    return msgspec.structs.replace(
        catalog,
        retired=catalog.retired - {id},
        fetched=catalog.fetched | {id} if is_fetched else catalog.fetched - {id},
        steps=catalog.steps | {id} if is_step else catalog.steps - {id},
        parents={**catalog.parents, id: parent} if parent else catalog.parents,
        tagged_at={**catalog.tagged_at, id: tagged_at} if tagged_at else catalog.tagged_at,
    )


def with_references(
    catalog: Catalog, references: Iterable[Reference], id: Digest, index: tuple[Digest, ...] = ()
) -> Catalog:
    """Return the catalog with ``references`` moved to the image ``id``.

    ``index``: Images for several platforms that the references name together.  Empty for the one image.
    """
    named = {str(reference): id for reference in references}
    steps = catalog.steps - {id} if named else catalog.steps
    indexes = {text: ids for text, ids in catalog.indexes.items() if text not in named}
    if index:
        indexes |= dict.fromkeys(named, index)
    return msgspec.structs.replace(
        catalog, references={**catalog.references, **named}, steps=steps, indexes=indexes
    )


def without(catalog: Catalog, references: Collection[Reference], ids: Collection[str]) -> Catalog:
    """Return the catalog without ``references``, and with the images ``ids`` retired."""
    texts, away = {str(reference) for reference in references}, set(ids)
    return msgspec.structs.replace(
        catalog,
        references={
            text: id for text, id in catalog.references.items() if text not in texts and id not in away
        },
        retired=catalog.retired | away,
        fetched=catalog.fetched - away,
        steps=catalog.steps - away,
        indexes={
            text: ids for text, ids in catalog.indexes.items() if text not in texts and away.isdisjoint(ids)
        },
    )
