"""What a build is asked for, what it reports, and what it asks of its client while it runs.

Two protocols start builds: the classic API (``POST /build``) and BuildKit's.  Both make a ``BuildRequest``, give the
context as a directory, and show the ``Progress`` in their own way.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from skep.engine.container import Stream
from skep.engine.images.digest import Digest
from skep.engine.images.progress import Message
from skep.engine.images.reference import Reference
from skep.model.container import Ulimit

OpenContext = Callable[[], Awaitable[Path]]
"""Gives the directory with the files of the context; it stays the caller's, and is not changed by a build.

Called at most once, when the first step needs a file.  What is in the directory is not trusted: links in it lead no
further than the directory.  Raises: SkepError: there is none."""


class StepLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the containers of ``RUN`` steps; 0 is none."""

    memory_bytes: int = 0
    nano_cpus: int = 0
    shm_bytes: int = 64 << 20
    ulimits: tuple[Ulimit, ...] = ()


class WantedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step whose result is looked for in a cache source."""

    key: str
    """Shared key of the step (``results.StepKey``)."""
    diff_ids: tuple[str, ...] = ()
    """Layers of the image before the step."""
    config: bytes | None = None
    """Configuration of the image before the step.  None after ``FROM scratch``."""
    command: tuple[str, ...] = ()
    """Command of the step's container, as the history has it."""
    adds_layer: bool | None = None
    """Whether the step has to add a layer, or must not.  None if only carrying it out shows that."""


class FoundStep(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a step in a cache source.  ``created``: A Timestamp."""

    created: str
    diff_id: str = ""
    """The layer that the step adds.  Empty if it adds none."""
    blob: Digest = Digest("")
    size: int = 0


class StepSource(Protocol):
    """A place with results of steps, usually of another node.  It is not trusted to be well-formed."""

    @property
    def name(self) -> str:
        """Name for messages."""

    def find(self, step: WantedStep) -> FoundStep | None:
        """Return the step's result, if the source has one on top of the same layers."""

    async def fetch(self, found: FoundStep, chain_id: Digest) -> None:
        """Put the layer of a result into the image store.  Raises: SkepError, OSError: it is missing or wrong."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A completed step, as a cache for other nodes gets it."""

    key: str
    parent: str = ""
    """Shared key of the step before it in its stage or base stage.  The id of a base image, or empty."""
    diff_ids: tuple[Digest, ...] = ()
    """Layers of the image after the step."""
    created: str = ""


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One build."""

    dockerfile: str
    """The text of the Dockerfile."""
    tags: tuple[Reference, ...] = ()
    """Given to the image when all steps have succeeded, together."""
    target: str = ""
    """Name or number of the last stage to build; empty: the last one."""
    arguments: Mapping[str, str | None] = {}
    """``--build-arg``; None: named without a value, which takes the Dockerfile's default."""
    labels: Mapping[str, str] = {}
    use_cache: bool = True
    stages_without_cache: tuple[str, ...] = ()
    """Names of stages whose steps are carried out anew, in lower case."""
    step_sources: tuple[StepSource, ...] = ()
    """Places where steps are looked for that are not known on this node."""
    inline_cache: bool = False
    """Whether the image's configuration gets the steps of the build, so that the image is a cache source."""
    images: Mapping[str, str] = {}
    """Images by the names that stand for them in FROM and ``--from``, in lower case."""
    directories: Mapping[str, OpenContext] = {}
    """Further contexts by the names that stand for them in ``--from``, in lower case."""
    pull: bool = False
    """Ask registries for the images of FROM even when they are here."""
    network: str = ""
    """Of ``RUN`` steps: default, none, host, or a network's name."""
    has_host_network: bool = False
    """Whether a step may have ``RUN --network=host``."""
    hostname: str = ""
    """Of ``RUN`` steps.  Empty for one of the container's own."""
    cache_namespace: str = ""
    """Of directories of ``RUN --mount=type=cache``."""
    epoch_s: int | None = None
    """``SOURCE_DATE_EPOCH``: the image and its history are not newer.  None for the time of the build."""
    rewrites_times: bool = False
    """Whether files of the layers are not newer than ``epoch_s`` either."""
    hosts: tuple[str, ...] = ()
    """``--add-host``: ``name:address``."""
    limits: StepLimits = StepLimits()
    credentials: Mapping[str, str] = {}
    """``X-Registry-Auth`` values by registry (``docker.io``, ``registry:5000``)."""
    platform: str = ""
    is_buildkit: bool = False
    """BuildKit's language: RUN --mount, COPY --link; stages that the target does not need are left out."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step, as it is shown."""

    number: int
    """From 1."""
    total: int
    text: str
    """The instruction, variables substituted: ``RUN make``."""
    stage: int = 0
    stage_name: str = ""


class Progress(Protocol):
    """Receives what happens, in order; never waits."""

    def started(self, step: Step) -> None:
        """A step begins."""

    def cached(self, step: Step) -> None:
        """Its result is here from an earlier build; ``finished`` follows."""

    def pulling(self, step: Step, message: Message) -> None:
        """Progress of the pull of a stage's image."""

    def running(self, step: Step, container_id: str) -> None:
        """A container was made for it."""

    def output(self, step: Step, stream: Stream, data: bytes) -> None:
        """A piece of what its command writes."""

    def removed(self, step: Step, container_id: str) -> None:
        """Its container is gone."""

    def warning(self, step: Step, text: str) -> None:
        """A warning for the author of the Dockerfile."""

    def finished(self, step: Step, image_id: Digest | None) -> None:
        """It has succeeded.  ``image_id``: the image so far, empty after ``FROM scratch``; None: no stage has begun."""

    def failed(self, step: Step, error: Exception) -> None:
        """It has failed, and the build with it."""


class Provider(Protocol):
    """What ``RUN --mount`` asks of the client of a build."""

    async def secret(self, id: str) -> bytes | None:
        """The content of a secret; None: the client has none with this id.  Raises: SkepError."""

    async def credentials(self, domain: str) -> str:
        """The ``X-Registry-Auth`` value for a registry; empty: the client has none for it."""

    def ssh(self, id: str) -> AbstractAsyncContextManager[Path | None]:
        """A socket of the client's ssh agent while the block runs; None: the client forwards none with this id."""


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """``image_id``: of the target's last step; ``unused_arguments``: those that no ARG declares."""

    image_id: Digest
    unused_arguments: tuple[str, ...] = ()
    records: tuple[StepRecord, ...] = ()
    """Every step that was carried out or found."""
    last: str = ""
    """Key of the target's last step.  The id of the base image if the target has no step."""


class Builds(Protocol):
    """Carries out builds."""

    def env_of(self, name: str) -> Sequence[str] | None:
        """Variables of an image, ``NAME=value``.  None if the image is not here."""

    async def build(
        self,
        request: BuildRequest,
        context: OpenContext,
        progress: Progress,
        provider: Provider | None = None,
    ) -> BuildResult:
        """Build an image and tag it.  Cancelling ends its container; nothing is left but finished steps.

        Raises: SkepError: in Docker's words; nothing was tagged.
        """
