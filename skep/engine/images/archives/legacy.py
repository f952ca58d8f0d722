"""Reads image archives from before Docker 1.10, which have a directory per layer, linked by ``parent``, and no digests.

The layers' digests are computed, and the old configuration is converted to today's form, byte for byte as Docker does
it, so that the image gets the same id as in Docker.

Source: moby, image/tarexport/load.go (legacyLoad), image/v1/imagev1.go (MakeConfigFromV1Config).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from skep.engine.images.archives.streams import MalformedArchive, plain_chunks
from skep.engine.images.digest import digest_of, hex_of
from skep.engine.images.image import LAYERS_MAX
from skep.errors import InvalidArgument

Find = Callable[[Path, str], Path]
"""Returns the regular file at a path within a directory.  Raises: InvalidArgument."""

DOCUMENT_BYTES_MAX = 8 << 20
"""Longest JSON document of an archive in bytes.  Limited, because it is read into memory."""
_GONE = ("id", "parent", "Size", "parent_id", "layer_id", "throwaway")


def legacy_items(directory: Path, find: Find) -> Iterator[Mapping[str, Any]]:
    """Yield the images named by ``repositories``, as fields of today's ``manifest.json`` entries.

    Their configurations are written into ``directory``.

    Raises:
        InvalidArgument: something is missing or malformed.
    """
    tags: dict[str, list[str]] = {}
    for name, ids in _object(directory, "repositories", find).items():
        for tag, id in _checked(ids, dict, "repositories").items():
            tags.setdefault(_checked(id, str, "repositories"), []).append(f"{name}:{tag}")
    for id, names in tags.items():
        chain = _chain(directory, id, find)
        content = _config(directory, chain, find)
        path = f"{hex_of(digest_of(content))}.json"
        (directory / path).write_bytes(content)
        layers = tuple(f"{one}/layer.tar" for one in chain)
        yield {"config": path, "repo_tags": tuple(names), "layers": layers}


def _chain(directory: Path, id: str, find: Find) -> Sequence[str]:
    """Return the layer ids from the bottom to ``id``."""
    chain: list[str] = []
    while id:
        if id in chain or len(chain) == LAYERS_MAX:
            raise InvalidArgument("max depth exceeded")
        chain.append(id)
        id = _checked(_object(directory, f"{id}/json", find).get("parent", ""), str, f"{id}/json")
    return chain[::-1]


def _config(directory: Path, chain: Sequence[str], find: Find) -> bytes:
    """Return today's configuration of the image whose layers are ``chain``."""
    documents = [_object(directory, f"{id}/json", find) for id in chain]
    diff_ids = [_diff_id(find(directory, f"{id}/layer.tar")) for id in chain]
    top = {name: value for name, value in documents[-1].items() if name not in _GONE}
    top["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    top["history"] = [_history(document) for document in documents]
    text = json.dumps(dict(sorted(top.items())), separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":  # escaped as in Go's JSON
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace")


def _history(document: Mapping[str, Any]) -> Mapping[str, Any]:
    made_by = document.get("container_config")
    command = (made_by.get("Cmd") if isinstance(made_by, dict) else None) or ()
    entry = {
        "created": document.get("created", "0001-01-01T00:00:00Z"),
        "author": document.get("author"),
        "created_by": " ".join(str(word) for word in command),
        "comment": document.get("comment"),
    }
    return {name: value for name, value in entry.items() if value}


def _diff_id(file: Path) -> str:
    hash = hashlib.sha256()
    try:
        with file.open("rb") as source:
            for piece in plain_chunks(source):
                hash.update(piece)
    except MalformedArchive as error:
        raise InvalidArgument(str(error)) from error
    return f"sha256:{hash.hexdigest()}"


def _object(directory: Path, path: str, find: Find) -> dict[str, Any]:
    file = find(directory, path)
    if file.stat().st_size > DOCUMENT_BYTES_MAX:
        raise InvalidArgument(f"invalid archive: {path} is larger than {DOCUMENT_BYTES_MAX} bytes")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"invalid archive: {path}: {error}") from error
    return dict(_checked(value, dict, path))


def _checked(value: Any, type_: type, path: str) -> Any:
    if not isinstance(value, type_):
        raise InvalidArgument(f"invalid archive: {path} has an unexpected {type(value).__name__}")
    return value
