"""An image: its configuration, and its state on this node.

The configuration is the JSON whose SHA-256 is Docker's image id; its bytes are kept as they came, and these
Structs read from them what the node needs.  Unknown fields are ignored here and live on in the bytes.

Source: OCI image-spec, config.md; moby, image/image.go.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from skep.api.bodies import decode_body
from skep.engine.images.digest import Digest, chain_ids, is_digest
from skep.engine.images.reference import Reference
from skep.errors import InvalidArgument
from skep.model.container import HealthConfig
from skep.model.encoding import ApiObject
from skep.model.times import ZERO_TIME, Timestamp

LAYERS_MAX = 125
"""What an image may have at most: overlayfs takes no more (and Docker refuses more).

Source: moby, layer/layer.go (maxLayerDepth).
"""


class ContainerDefaults(ApiObject):
    """How a container of the image runs unless its request has other options (``config`` of the configuration).

    The first ones are only shown: they are those of the container that the image was made from.
    """

    hostname: str = ""
    domainname: str = ""
    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    tty: bool = msgspec.field(name="Tty", default=False)
    open_stdin: bool = False
    stdin_once: bool = False
    image: str = ""
    user: str = ""
    exposed_ports: Mapping[str, Any] | None = None
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    volumes: Mapping[str, Any] | None = None
    working_dir: str = ""
    labels: Mapping[str, str] | None = None
    stop_signal: str = ""
    stop_timeout: int | None = None
    shell: tuple[str, ...] | None = None
    on_build: tuple[str, ...] | None = None
    healthcheck: HealthConfig | None = None


_ALWAYS_WRITTEN: Mapping[str, Any] = {
    "Hostname": "",
    "Domainname": "",
    "User": "",
    "AttachStdin": False,
    "AttachStdout": False,
    "AttachStderr": False,
    "Tty": False,
    "OpenStdin": False,
    "StdinOnce": False,
    "Env": None,
    "Cmd": None,
    "Image": "",
    "Volumes": None,
    "WorkingDir": "",
    "Entrypoint": None,
    "OnBuild": None,
    "Labels": None,
}
"""The fields of a configuration that Docker writes even when they are empty."""


def as_docker_writes(defaults: ContainerDefaults | None) -> Mapping[str, Any]:
    """Options of containers as Docker writes them."""
    return {**_ALWAYS_WRITTEN, **msgspec.to_builtins(defaults or ContainerDefaults())}


class RootFS(msgspec.Struct, frozen=True):
    """``rootfs`` of the configuration: its layers by digest of their plain tar, bottom first."""

    type: str = "layers"
    diff_ids: tuple[str, ...] | None = None


class HistoryEntry(msgspec.Struct, frozen=True):
    """One step of how the image was built, oldest first; ``empty_layer`` steps made no layer."""

    created: str | None = None
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


class ImageConfig(msgspec.Struct, frozen=True):
    """The configuration."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(name="os.version", default="")
    author: str = ""
    comment: str = ""
    created: str | None = None
    parent: str = ""
    container: str = ""
    docker_version: str = ""
    config: ContainerDefaults | None = None
    container_config: ContainerDefaults | None = None
    rootfs: RootFS | None = None
    history: tuple[HistoryEntry, ...] | None = None

    @property
    def diff_ids(self) -> Sequence[str]:
        """Layers by digest of their plain tar, bottom first."""
        return (self.rootfs.diff_ids if self.rootfs else None) or ()

    @property
    def defaults(self) -> ContainerDefaults:
        """Options for containers of the image; empty where it sets none."""
        return self.config or ContainerDefaults()


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image in the store."""

    id: Digest
    config: ImageConfig
    references: tuple[Reference, ...] = ()
    """Tags and digests that name it, sorted."""
    size_bytes: int = 0
    """All its layers together, unpacked."""
    parent: str = ""
    tagged_at: Timestamp = ZERO_TIME
    """When a user last tagged it here."""
    is_step: bool = False
    """It was made on the way of a build by BuildKit's protocol, and is no build's result."""

    @property
    def tags(self) -> Sequence[Reference]:
        """The references with a tag."""
        return tuple(reference for reference in self.references if reference.tag)

    @property
    def digests(self) -> Sequence[Reference]:
        """The references with a digest."""
        return tuple(reference for reference in self.references if reference.digest)

    @property
    def spellings(self) -> frozenset[str]:
        """How the spec of a service may name the image."""
        return frozenset(name for one in self.references for name in one.spellings) | {self.id}

    @property
    def chain(self) -> Sequence[Digest]:
        """Ids of the layers together with all below each, bottom first."""
        return chain_ids(self.config.diff_ids)

    @property
    def created(self) -> str:
        """When it was built, as its configuration has it."""
        return self.config.created or ZERO_TIME


def parse_config(content: bytes) -> ImageConfig:
    """The configuration in ``content``.

    Raises:
        InvalidArgument: it is no JSON of that shape, has no root file system, or names too many layers.

    Source: moby, image/image.go (NewFromJSON), layer/layer_store.go (ErrMaxDepthExceeded).
    """
    config = decode_body(content, ImageConfig)
    if config.rootfs is None:
        raise InvalidArgument("invalid image JSON, no RootFS key")
    if len(config.diff_ids) > LAYERS_MAX:
        raise InvalidArgument("max depth exceeded")
    if not all(is_digest(diff_id) for diff_id in config.diff_ids):
        raise InvalidArgument("invalid image JSON: a layer is not named by a digest")
    return config
