"""Builds the configuration of an image that a commit, an import or a build step makes.  Pure.

The bytes are the same as Docker would write, except for fields that Docker does not have.

Source: moby 20.10, image/image.go (NewChildImage), daemon/images/image_commit.go.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from skep.errors import InvalidArgument

EMPTY_LAYER = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
"""Digest of a tar without members.  As in Docker, such a layer is not added to an image.

Source: moby, layer/empty.go (DigestSHA256EmptyTar).
"""

INLINE_CACHE = "moby.buildkit.cache.v0"
"""Name of the field in a configuration that has the steps of the image's build.

Source: buildkit, exporter/containerimage/exptypes, cache/remotecache/import.go (image.Cache).
"""
_KEPT = ("architecture", "os", "variant", "os.version", "os.features")
"""Fields that an image inherits from its parent, in addition to layers and history."""


class HistoryStep(msgspec.Struct, frozen=True, kw_only=True):
    """Change that made the image from its parent: an entry of ``docker history``.

    Args:
        diff_id: Digest of the layer with the change.  Empty, or ``EMPTY_LAYER``, if there is no layer.
        created: A Timestamp.
        has_entry: Whether the history shows it.
    """

    created: str
    diff_id: str = ""
    created_by: str = ""
    author: str = ""
    comment: str = ""
    has_entry: bool = True


def child_config(
    parent: bytes | None,
    step: HistoryStep,
    config: Mapping[str, Any],
    *,
    more: Mapping[str, Any] | None = None,
    platform: Mapping[str, str] | None = None,
) -> bytes:
    """Return the configuration of the image that ``step`` makes from ``parent``.

    Args:
        parent: Stored configuration of the parent.  None without a parent.
        config: Options of the image's containers (``config`` of the configuration), by their names in JSON.
        more: Further fields of the configuration: ``container``, ``container_config``, ...
        platform: ``architecture``, ``os`` and ``variant`` of an image without a parent.

    Raises:
        InvalidArgument: ``parent`` is not a configuration.
    """
    above: Mapping[str, Any] = _decoded(parent) if parent is not None else (platform or {})
    has_layer = step.diff_id not in ("", EMPTY_LAYER)
    rootfs, history = above.get("rootfs") or {}, above.get("history") or []
    document = {
        **{name: above[name] for name in _KEPT if above.get(name)},
        **(more or {}),
        "config": config,
        "created": step.created,
        "rootfs": {
            "type": "layers",
            "diff_ids": [*(rootfs.get("diff_ids") or ()), *([step.diff_id] if has_layer else ())],
        },
        "history": [*history, *([_entry(step, has_layer=has_layer)] if step.has_entry else ())],
    }
    if step.author:
        document["author"] = step.author
    if step.comment:
        document["comment"] = step.comment
    try:
        return msgspec.json.encode(document, order="sorted")
    except UnicodeEncodeError:  # bytes of a Dockerfile that are not UTF-8 are replaced, as in Go's encoder
        text = json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()


def history_length(content: bytes) -> int:
    """Return the number of entries of a configuration's history.  Raises: InvalidArgument."""
    return len(_decoded(content).get("history") or ())


def not_newer(content: bytes, created: str, inherited: int) -> bytes:
    """Return a configuration in which no time is later than ``created``.

    Args:
        created: A Timestamp in UTC.
        inherited: Number of entries at the start of the history that keep their times.

    Raises:
        InvalidArgument: ``content`` is not a configuration.

    Source: buildkit, exporter/containerimage/writer.go (patchImageConfig).
    """
    document = _decoded(content)
    history = [dict(entry) for entry in document.get("history") or ()]
    for entry in (document, *history[inherited:]):
        # Without the Z, a time with a fraction sorts after the same second without one.
        if str(entry.get("created") or "~").rstrip("Z") > created.rstrip("Z"):
            entry["created"] = created
    return msgspec.json.encode({**document, "history": history}, order="sorted")


def with_cache(content: bytes, cache: bytes) -> bytes:
    """Return a configuration with the steps of its build, in BuildKit's format (``step_records``)."""
    document = {**_decoded(content), INLINE_CACHE: base64.b64encode(cache).decode()}
    return msgspec.json.encode(document, order="sorted")


def cache_in(content: bytes) -> bytes:
    """Return the steps that ``with_cache`` added to a configuration, or nothing.  Raises: InvalidArgument."""
    try:
        return base64.b64decode(msgspec.json.decode(content, type=_Cached).cache or "", validate=True)
    except (ValueError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"invalid cache in an image configuration: {error}") from error


class _Cached(msgspec.Struct, frozen=True):
    cache: str | None = msgspec.field(name=INLINE_CACHE, default=None)


def _entry(step: HistoryStep, *, has_layer: bool) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = {
        "created": step.created,
        "created_by": step.created_by,
        "author": step.author,
        "comment": step.comment,
        "empty_layer": not has_layer,
    }
    return {name: value for name, value in fields.items() if value}


def _decoded(content: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"invalid image configuration: {error}") from error
