"""The data of a node's images beyond their configurations: names, parents, times; kept in one file."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from skep.aio.failures import log_error
from skep.aio.trees import discard_tree_now
from skep.engine.images.digest import Digest
from skep.engine.images.reference import Reference, parse_reference
from skep.errors import InvalidArgument
from skep.linux.files import is_no_file
from skep.model.times import Timestamp


class Catalog(msgspec.Struct, frozen=True):
    """What is known of images beyond their configurations.

    ``references``: reference -> image id.  ``tagged_at``, ``parents``: by image id.  ``retired``: images that were
    removed while containers still use their layers; they are not shown.  ``fetched``: those that came from a registry
    or another node, and that no user has loaded or tagged.
    """

    references: Mapping[str, Digest] = {}
    tagged_at: Mapping[str, Timestamp] = {}
    parents: Mapping[str, str] = {}
    retired: frozenset[str] = frozenset()
    fetched: frozenset[str] = frozenset()


def read_catalog(file: Path) -> Catalog:
    """What an earlier process wrote; one that is damaged is moved aside, and the images have no names.

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
        log_error(error, "names of images lost: their file is damaged", file=str(file), kept_as=str(aside))
        discard_tree_now(aside)
        with suppress(OSError):
            file.rename(aside)
        return Catalog()
    return catalog


def with_references(catalog: Catalog, references: Iterable[Reference], id: Digest) -> Catalog:
    """The catalog after ``references`` were given to the image ``id``."""
    named = {str(reference): id for reference in references}
    return msgspec.structs.replace(catalog, references={**catalog.references, **named})
