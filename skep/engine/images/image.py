"""An image: its configuration, and its state on this node.

The configuration is the JSON document whose SHA-256 is Docker's image id.  Its bytes are kept unchanged, and these
structs read the fields that the node needs.  Unknown fields are ignored here and stay in the bytes.

Source: OCI image-spec, config.md; moby, image/image.go.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from skep.api.formats.bodies import decode_body
from skep.engine.images.digest import Digest, chain_ids, digest_of, is_digest
from skep.engine.images.reference import Reference
from skep.errors import InvalidArgument
from skep.model.container import HealthConfig
from skep.model.values.encoding import ApiObject
from skep.model.values.times import ZERO_TIME, Timestamp

LAYERS_MAX = 125
"""Largest number of layers of an image.  This is the limit of overlayfs and of Docker.

Source: moby, layer/layer.go (maxLayerDepth).
"""


class ContainerDefaults(ApiObject):
    """Default options of the image's containers (``config`` of the configuration).  A request may override them.

    The fields up to ``image`` are only shown.  They are from the container from which the image was made.
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
    args_escaped: bool = False
    """Set by BuildKit for every CMD, without effect on Linux."""
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
"""Fields of a configuration that Docker writes even if they are empty."""


def as_docker_writes(defaults: ContainerDefaults | None) -> Mapping[str, Any]:
    """Return default options of containers in the form in which Docker writes them into a configuration."""
    return {**_ALWAYS_WRITTEN, **msgspec.to_builtins(defaults or ContainerDefaults())}


class RootFS(msgspec.Struct, frozen=True):
    """``rootfs`` of the configuration: the digests of the layers' plain tars, bottom first."""

    type: str = "layers"
    diff_ids: tuple[str, ...] | None = None


class HistoryEntry(msgspec.Struct, frozen=True):
    """One step of the image's build.  ``empty_layer``: Whether the step has no layer."""

    created: str | None = None
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


class ImageConfig(msgspec.Struct, frozen=True):
    """Configuration of an image."""

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
        """Digests of the layers' plain tars, bottom first."""
        return (self.rootfs.diff_ids if self.rootfs else None) or ()

    @property
    def defaults(self) -> ContainerDefaults:
        """Options for containers of the image.  Empty if it sets none."""
        return self.config or ContainerDefaults()


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image in the store."""

    id: Digest
    config: ImageConfig
    references: tuple[Reference, ...] = ()
    """References with a tag or digest that name the image, sorted."""
    size_bytes: int = 0
    """Unpacked size of all layers together."""
    parent: str = ""
    tagged_at: Timestamp = ZERO_TIME
    """Time when a user last tagged the image on this node."""
    is_step: bool = False
    """Whether it is an intermediate image of a build by BuildKit's protocol, and not the result of any build."""
    is_member: bool = False
    """Whether it has no name of its own, and a name with several platforms includes it."""

    @property
    def tags(self) -> Sequence[Reference]:
        """References with a tag."""
        return tuple(reference for reference in self.references if reference.tag)

    @property
    def digests(self) -> Sequence[Reference]:
        """References with a digest."""
        return tuple(reference for reference in self.references if reference.digest)

    @property
    def spellings(self) -> frozenset[str]:
        """Names by which a service's spec may refer to the image."""
        return frozenset(name for one in self.references for name in one.spellings) | {self.id}

    @property
    def chain(self) -> Sequence[Digest]:
        """Chain ids of the layers, bottom first."""
        return chain_ids(self.config.diff_ids)

    @property
    def created(self) -> str:
        """Time when the image was built, from its configuration."""
        return self.config.created or ZERO_TIME


EMPTY: Final = Image(id=Digest(""), config=ImageConfig())
"""The image of containers that run programs of the machine.  It is in no store."""


def parse_config(content: bytes) -> ImageConfig:
    """Parse the configuration in ``content``.

    Raises:
        InvalidArgument: it is not JSON of this form, has no root file system, or names too many layers.

    Source: moby, image/image.go (NewFromJSON), layer/layer_store.go (ErrMaxDepthExceeded).
    """
    config = decode_body(content, ImageConfig)
    if config.rootfs is None:
        raise InvalidArgument("invalid image JSON, no RootFS key")
    if len(config.diff_ids) > LAYERS_MAX:
        raise InvalidArgument("max depth exceeded")
    if not all(is_digest(diff_id) for diff_id in config.diff_ids):
        raise InvalidArgument("invalid image JSON: a layer has no valid digest")
    return config


def read_config(file: Path, id: Digest) -> ImageConfig:
    """Read and verify a configuration.  Raises: InvalidArgument: it does not have this digest; OSError."""
    content = file.read_bytes()
    if digest_of(content) != id:
        raise InvalidArgument("its configuration does not match its id")
    return parse_config(content)
