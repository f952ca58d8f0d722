"""What a stack consists of, ready to be compared with a cluster."""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from skep.model.dependencies import Dependency
from skep.model.service import ServiceSpec
from skep.stack.document import Place

NAMESPACE: Final = "com.docker.stack.namespace"
"""Docker's label of everything in a stack: its name."""
IMAGE: Final = "com.docker.stack.image"
NODES_NETWORKS: Final = ("host", "none", "bridge")
"""Names of the networks that every node has of its own."""
"""Docker's label of a service: its image as the file has it."""


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """How an image is made: arguments of ``docker build``, and its context (a directory or a URL)."""

    context: str
    arguments: tuple[str, ...] = ()


class StackService(msgspec.Struct, frozen=True, kw_only=True):
    """One service.  Networks, secrets and configs in ``spec`` are named, without ids."""

    place: Place
    spec: ServiceSpec
    depends_on: tuple[Dependency, ...] = ()
    """By the names in the files."""
    build: Build | None = None
    binds: tuple[str, ...] = ()
    """Paths of the machine that it mounts."""


class StackNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """A network: ``body`` as ``POST /networks/create`` has it."""

    place: Place
    name: str
    is_external: bool = False
    body: Mapping[str, Any] = {}


class StackFile(msgspec.Struct, frozen=True, kw_only=True):
    """A secret or a config.  ``content`` None: it is external.  ``is_versioned``: its name has its content in it."""

    place: Place
    name: str
    is_external: bool = False
    content: bytes | None = None
    is_versioned: bool = False
    labels: Mapping[str, str] = {}
    templating: Mapping[str, Any] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """As ``POST /secrets/create`` and ``POST /configs/create`` have it."""
        made: dict[str, Any] = {"Name": self.name, "Labels": dict(self.labels)}
        if self.content is not None:
            made["Data"] = base64.b64encode(self.content).decode()
        if self.templating is not None:
            made["Templating"] = dict(self.templating)
        return made


class Stack(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a stack's files ask for, by the names in the files."""

    name: str
    services: Mapping[str, StackService] = {}
    networks: Mapping[str, StackNetwork] = {}
    secrets: Mapping[str, StackFile] = {}
    configs: Mapping[str, StackFile] = {}


def versioned_name(name: str, content: bytes, *, is_secret: bool, settings: bytes = b"") -> str:
    """The name of an object that never changes: other content has another name.

    A secret's name must not help to guess the secret, so its suffix costs 30 ms and 16 MiB to compute for each guess.
    ``settings``: what else the object has.
    """
    if is_secret:
        digest = hashlib.scrypt(
            content, salt=b"skep.stack:" + name.encode() + settings, n=1 << 14, r=8, p=1, dklen=5
        )
    else:
        digest = hashlib.sha256(settings + b"\0" + content).digest()[:5]
    return f"{name[:53]}-{digest.hex()}"
