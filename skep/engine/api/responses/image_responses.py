"""Images as the Engine API shows them.

Source: moby 20.10, api/types/types.go (ImageInspect), api/types/image_summary.go, api/types/image/image_history.go.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from skep.api.http.server import ApiVersion
from skep.engine.images.image import Image, as_docker_writes
from skep.engine.images.listing import Listed, created_ns
from skep.engine.images.local import LocalImages
from skep.errors import InvalidArgument
from skep.model.values.times import SECOND_NS, ZERO_TIME, unix_ns

_EMPTY_LISTS = ApiVersion("1.43")
_WITHOUT_VIRTUAL_SIZE = ApiVersion("1.44")
_WITHOUT_CONTAINER_CONFIG = ApiVersion("1.45")
_V1_50 = ApiVersion("1.50")
_V1_52 = ApiVersion("1.52")
_OMITTED_IF_EMPTY = ("Parent", "Comment", "DockerVersion", "Author")
_OF_CONTAINERS = frozenset(
    {
        *(
            "Hostname",
            "Domainname",
            "AttachStdin",
            "AttachStdout",
            "AttachStderr",
            "Tty",
            "OpenStdin",
            "StdinOnce",
        ),
        *("Image", "NetworkDisabled", "MacAddress", "StopTimeout"),
    }
)
"""Fields of ``Config`` that describe the container from which an image was made, and not the image."""


def summary(
    listed: Listed, version: ApiVersion, *, shared_bytes: int = -1, containers: int = -1
) -> Mapping[str, Any]:
    """Return one entry of the list for ``docker images``.  The value -1 means that it was not computed."""
    image = listed.image
    tags = [reference.familiar for reference in listed.references if reference.tag]
    digests = [reference.familiar for reference in listed.references if reference.digest]
    response: dict[str, Any] = {
        "Containers": containers,
        "Created": created_ns(image) // SECOND_NS,
        "Id": image.id,
        "Labels": image.config.defaults.labels,
        "ParentId": image.parent,
        "RepoDigests": digests,
        "RepoTags": tags,
        "SharedSize": shared_bytes,
        "Size": image.size_bytes,
    }
    if version < _EMPTY_LISTS:
        response["RepoDigests"] = digests or None
        response["RepoTags"] = tags or None
        if not listed.references:
            response["RepoDigests"], response["RepoTags"] = ["<none>@<none>"], ["<none>:<none>"]
    if version < _WITHOUT_VIRTUAL_SIZE:
        response["VirtualSize"] = image.size_bytes
    return response


def inspected(image: Image, images: LocalImages, version: ApiVersion) -> Mapping[str, Any]:
    """Return the response to ``docker image inspect``."""
    config = image.config
    response: dict[str, Any] = {
        "Id": image.id,
        "RepoTags": [reference.familiar for reference in image.tags],
        "RepoDigests": [reference.familiar for reference in image.digests],
        "Parent": image.parent,
        "Comment": config.comment,
        "Created": config.created or ZERO_TIME,
        "Container": config.container,
        "ContainerConfig": as_docker_writes(config.container_config),
        "DockerVersion": config.docker_version,
        "Author": config.author,
        "Config": as_docker_writes(config.config) if config.config is not None else None,
        "Architecture": config.architecture,
        "Variant": config.variant,
        "Os": config.os,
        "OsVersion": config.os_version,
        "Size": image.size_bytes,
        "VirtualSize": image.size_bytes,
        "GraphDriver": {"Data": _graph(image, images), "Name": "overlay2"},
        "RootFS": {"Type": "layers", "Layers": list(config.diff_ids)},
        "Metadata": {"LastTagTime": image.tagged_at},
    }
    for name in ("Variant", "OsVersion"):
        if not response[name]:
            del response[name]
    if version >= _WITHOUT_VIRTUAL_SIZE:
        del response["VirtualSize"]
        if not config.created:
            del response["Created"]
    if version >= _WITHOUT_CONTAINER_CONFIG:
        del response["Container"], response["ContainerConfig"]
    if version >= _V1_50 and response["Config"] is not None:
        fields = response["Config"].items()
        response["Config"] = {name: value for name, value in fields if name not in _OF_CONTAINERS}
    if version >= _V1_52:
        if response["Config"] is not None:
            response["Config"] = {name: value for name, value in response["Config"].items() if value}
        for name in _OMITTED_IF_EMPTY:
            if not response[name]:
                del response[name]
    return response


def history(image: Image, images: LocalImages) -> Sequence[Mapping[str, Any]]:
    """Return the response to ``docker history``: the steps, latest first, with the image on this node that each
    created.
    """
    sizes = [images.layer_store.all()[chain_id].size_bytes for chain_id in image.chain]
    steps: list[dict[str, Any]] = [
        {
            "Comment": entry.comment,
            "Created": _unix_s(entry.created),
            "CreatedBy": entry.created_by,
            "Id": "<missing>",
            "Size": 0 if entry.empty_layer or not sizes else sizes.pop(0),
            "Tags": None,
        }
        for entry in image.config.history or ()
    ]
    steps.reverse()
    known: Image | None = image
    for step in steps:
        if known is None:
            break
        tags = [reference.familiar for reference in known.tags]
        step |= {"Id": known.id, "Tags": tags or None}
        known = images.lookup(known.parent) if known.parent else None
    return steps


def _graph(image: Image, images: LocalImages) -> Mapping[str, str]:
    lower = [str(path) for path in images.layers(image)]
    data = {"UpperDir": lower[0]} if lower else {}
    return data | ({"LowerDir": ":".join(lower[1:])} if lower[1:] else {})


def _unix_s(stamp: str | None) -> int:
    try:
        return unix_ns(stamp or ZERO_TIME) // SECOND_NS
    except InvalidArgument:
        return unix_ns(ZERO_TIME) // SECOND_NS
