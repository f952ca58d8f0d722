"""Stacks and their parts, ready to be compared with a cluster."""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from skep.model.options.dependencies import Dependency
from skep.model.service import ServiceSpec
from skep.stack.compose.document import FilePosition

"""Docker's label with the stack's name.  Every object of a stack has it."""
IMAGE: Final = "com.docker.stack.image"
NODES_NETWORKS: Final = ("host", "none", "bridge")
"""Names of the networks that every node has locally."""
"""Docker's label with a service's image as written in the file."""


class BuildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An image build: the arguments of ``docker build``, and its context (a directory or a URL)."""

    context: str
    arguments: tuple[str, ...] = ()


class StackService(msgspec.Struct, frozen=True, kw_only=True):
    """One service.  Networks, secrets and configs in ``spec`` are named, without ids."""

    place: FilePosition
    spec: ServiceSpec
    depends_on: tuple[Dependency, ...] = ()
    """Dependencies, by the names in the files."""
    build: BuildSpec | None = None
    binds: tuple[str, ...] = ()
    """Host paths that the service mounts."""


class StackNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """A network.  ``body``: the body of ``POST /networks/create``."""

    place: FilePosition
    name: str
    is_external: bool = False
    body: Mapping[str, Any] = {}


class StackFile(msgspec.Struct, frozen=True, kw_only=True):
    """A secret or config.  ``content`` is None if it is external.  ``is_versioned``: its name contains a hash of the
    content.
    """

    place: FilePosition
    name: str
    is_external: bool = False
    content: bytes | None = None
    is_versioned: bool = False
    labels: Mapping[str, str] = {}
    templating: Mapping[str, Any] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """Return the body of ``POST /secrets/create`` or ``POST /configs/create``."""
        made: dict[str, Any] = {"Name": self.name, "Labels": dict(self.labels)}
        if self.content is not None:
            made["Data"] = base64.b64encode(self.content).decode()
        if self.templating is not None:
            made["Templating"] = dict(self.templating)
        return made


class Stack(msgspec.Struct, frozen=True, kw_only=True):
    """The desired objects of a stack, by their names in the files."""

    name: str
    services: Mapping[str, StackService] = {}
    networks: Mapping[str, StackNetwork] = {}
    secrets: Mapping[str, StackFile] = {}
    configs: Mapping[str, StackFile] = {}


def versioned_name(name: str, content: bytes, *, is_secret: bool, settings: bytes = b"") -> str:
    """Return a name with a hash of the content.  Other content has another name, because the content of an object
    cannot change.

    A secret's name must not help to guess the secret.  Each guess costs the 30 ms and 16 MiB that it takes to compute
    the hash.  ``settings``: further bytes to hash, such as the object's labels.
    """
    if is_secret:
        digest = hashlib.scrypt(
            content, salt=b"skep.stack:" + name.encode() + settings, n=1 << 14, r=8, p=1, dklen=5
        )
    else:
        digest = hashlib.sha256(settings + b"\0" + content).digest()[:5]
    return f"{name[:53]}-{digest.hex()}"
