"""Records of build steps in caches for other nodes.  Pure.

The format is BuildKit's, so BuildKit and this engine read each other's caches without an error.  Neither finds steps of
the other, because they compute the digests of steps differently.  This engine uses the id of the base image and the
instructions since (``results``).

A cache is trusted only with its own layers.  A result counts only if its lower layers are the layers of the image
before the step.  So a cache can add one layer to a build, but cannot replace the layers that the build already has.

Source: buildkit, cache/remotecache/v1/types/spec.go, cache/remotecache/v1/parse.go, cache/remotecache/inline/inline.go.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from skep.engine.build.interface import FoundStep, StepRecord, WantedStep
from skep.engine.images.child import EMPTY_LAYER
from skep.engine.images.digest import Digest, chain_ids, is_digest
from skep.engine.images.registry.manifests import Descriptor
from skep.errors import InvalidArgument
from skep.model.values.times import ZERO_TIME, unix_ns

CACHE_CONFIG_TYPE = "application/vnd.buildkit.cacheconfig.v0"
CONFIG_BYTES_MAX = 4 << 20
"""Four times BuildKit's limit.  A build has at most 1,000 steps, and each takes some 200 bytes."""
_RECORDS_MAX = 20_000
"""Twenty times the steps of the largest build, for caches that several builds write."""
_LAYERS_MAX = 20_000
"""One for each step at most."""
_OBJECTS_MAX = 250_000
"""Maximum number of JSON objects.  They are counted before they are decoded, because decoding takes ten times the
memory.
"""
_RESULTS_MAX = 16
"""Largest number of results of one record, and of records of one step."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", re.ASCII)


class CacheLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer as a registry keeps it."""

    blob: str
    size: int
    diff_id: str
    media_type: str = ""


def chosen(records: Sequence[StepRecord], last: str, *, is_max: bool) -> Sequence[StepRecord]:
    """Return the records to export.

    Args:
        last: Key of the target's last step.
        is_max: Whether the cache gets every step of the build.  Otherwise, the steps of the target and its bases.
    """
    if is_max:
        return records
    by_key, found = {record.key: record for record in records}, list[StepRecord]()
    while (record := by_key.pop(last, None)) is not None:
        found.append(record)
        last = record.parent
    return found[::-1]


def inline_cache(records: Sequence[StepRecord], last: str, diff_ids: Sequence[str]) -> bytes:
    """Return the steps of an image with the layers ``diff_ids``, for its configuration."""
    own = chosen(records, last, is_max=False)
    tops = {record.key: len(record.diff_ids) - 1 for record in own}
    fitting = [record for record in own if tuple(diff_ids[: len(record.diff_ids)]) == record.diff_ids]
    return msgspec.json.encode(_encoded(fitting, tops))


def cache_config(records: Sequence[StepRecord], layers: Mapping[Digest, CacheLayer]) -> bytes:
    """Return the configuration of a cache artifact.

    Args:
        layers: Layers by their chain ids.  Every layer of ``records`` is among them.
    """
    numbers: dict[Digest, int] = {}
    encoded: list[dict[str, Any]] = []
    tops: dict[str, int] = {}
    for record in records:
        parent = -1
        for chain_id in chain_ids(record.diff_ids):
            if chain_id not in numbers:
                numbers[chain_id] = len(encoded)
                encoded.append(_layer(layers[chain_id], parent, record.created))
            parent = numbers[chain_id]
        tops[record.key] = parent
    return msgspec.json.encode({"layers": encoded, "records": _encoded(records, tops)})


def _layer(layer: CacheLayer, parent: int, created: str) -> dict[str, Any]:
    about = {
        "mediaType": layer.media_type,
        "diffID": layer.diff_id,
        "size": layer.size,
        "createdAt": created or ZERO_TIME,
    }
    return {"blob": layer.blob, "parent": parent, "annotations": about}


def _encoded(records: Sequence[StepRecord], tops: Mapping[str, int]) -> list[dict[str, Any]]:
    numbers = {record.key: number for number, record in enumerate(records)}
    found = []
    for record in records:
        one: dict[str, Any] = {"digest": f"sha256:{record.key}"}
        if tops[record.key] >= 0:
            one["layers"] = [{"layer": tops[record.key], "createdAt": record.created or ZERO_TIME}]
        if record.parent in numbers:
            one["inputs"] = [[{"link": numbers[record.parent]}]]
        found.append(one)
    return found


class _Annotations(msgspec.Struct, frozen=True, rename="camel"):
    diff_id: str = msgspec.field(name="diffID", default="")


class _Layer(msgspec.Struct, frozen=True):
    blob: str = ""
    parent: int = 0
    annotations: _Annotations | None = None


class _Result(msgspec.Struct, frozen=True, rename="camel"):
    layer: int = 0
    created_at: str = ""


class _Record(msgspec.Struct, frozen=True):
    digest: str = ""
    layers: tuple[_Result, ...] | None = None


class _Config(msgspec.Struct, frozen=True):
    layers: tuple[_Layer, ...] | None = None
    records: tuple[_Record, ...] | None = None


def is_time(text: str) -> bool:
    """Return whether a text is a time in UTC, as the configuration of an image has it."""
    try:
        unix_ns(text)
    except InvalidArgument:
        return False
    return _TIME.fullmatch(text) is not None


class StepTable:
    """Results of steps in one cache."""

    def __init__(self, layers: Sequence[tuple[CacheLayer, int]], records: Sequence[_Record]) -> None:
        """``layers``: Each with the number of the layer below it, or -1.  Raises: InvalidArgument: too many."""
        if len(records) > _RECORDS_MAX or len(layers) > _LAYERS_MAX:
            raise InvalidArgument(f"a cache has more than {_RECORDS_MAX} steps or {_LAYERS_MAX} layers")
        self._layers = layers
        self._results: dict[str, list[_Result]] = {}
        for record in records:
            results = self._results.setdefault(record.digest.removeprefix("sha256:"), [])
            results.extend((record.layers or ())[: _RESULTS_MAX - len(results)])

    @classmethod
    def of_image(cls, cache: bytes, layers: Sequence[CacheLayer]) -> "StepTable":
        """Read the cache in an image's configuration.  Raises: ValueError; InvalidArgument."""
        _check_size(cache)
        records = msgspec.json.decode(cache, type=tuple[_Record, ...])
        return cls([(layer, number - 1) for number, layer in enumerate(layers)], records)

    @classmethod
    def of_config(cls, content: bytes, blobs: Sequence[Descriptor]) -> "StepTable":
        """Read the configuration of a cache artifact.

        ``blobs``: Blobs in the artifact's manifest.

        Raises: ValueError; InvalidArgument.
        """
        _check_size(content)
        sizes = {blob.digest: blob.size for blob in blobs}
        config = msgspec.json.decode(content, type=_Config)
        layers = [
            (
                CacheLayer(
                    blob=one.blob,
                    size=sizes.get(one.blob, -1),
                    diff_id=one.annotations.diff_id if one.annotations is not None else "",
                ),
                one.parent,
            )
            for one in config.layers or ()
        ]
        return cls(layers, config.records or ())

    def __len__(self) -> int:
        return len(self._results)

    def find(self, step: WantedStep) -> FoundStep | None:
        """Return the result of a step, if its lower layers are the layers of the image before the step."""
        for result in self._results.get(step.key, ()):
            layers = self._chain(result.layer, len(step.diff_ids) + 1)
            diff_ids = tuple(layer.diff_id for layer in layers)
            if not layers or not is_time(result.created_at):
                continue
            if diff_ids == step.diff_ids and step.adds_layer is not True:
                return FoundStep(created=result.created_at)
            if diff_ids[:-1] == step.diff_ids and step.adds_layer is not False and _is_whole(layers[-1]):
                top = layers[-1]
                return FoundStep(
                    created=result.created_at, diff_id=top.diff_id, blob=Digest(top.blob), size=top.size
                )
        return None

    def _chain(self, top: int, length_max: int) -> Sequence[CacheLayer]:
        """Return the layers up to ``top``, bottom first.  Empty if there are too many, if they form a ring, or if one
        is missing.
        """
        found: list[CacheLayer] = []
        while top != -1:
            if not 0 <= top < len(self._layers) or len(found) == length_max:
                return ()
            layer, top = self._layers[top]
            found.append(layer)
        return found[::-1]


def _check_size(content: bytes) -> None:
    if content.count(b"{") > _OBJECTS_MAX:
        raise InvalidArgument(f"a cache has more than {_OBJECTS_MAX} objects")


def _is_whole(layer: CacheLayer) -> bool:
    """Return whether a layer can be fetched.  An empty one is not a layer of an image."""
    is_layer = is_digest(layer.diff_id) and layer.diff_id != EMPTY_LAYER
    return is_layer and is_digest(layer.blob) and layer.size >= 0
