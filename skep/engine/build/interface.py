"""Interface of builds: the request, the progress, and the client's provider.

Two protocols start builds: the classic API (``POST /build``) and BuildKit's.  Both make a ``BuildRequest``, provide the
context as a directory, and show the ``Progress`` in their own way.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from skep.engine.containers.container import StandardStream
from skep.engine.images.digest import Digest
from skep.engine.images.progress import ProgressMessage
from skep.engine.images.reference import Reference
from skep.errors import InvalidArgument
from skep.model.container import Ulimit

OpenContext = Callable[[], Awaitable[Path]]
"""Opens the directory with the files of the context.

The directory belongs to the caller, and a build does not change it.  A build calls this at most once, when the first
step needs a file.  The content is not trusted, so links in it are not followed out of the directory.  Raises:
SkepError: there is no context.
"""


class StepFailed(InvalidArgument):
    """A command ended with a code other than 0."""

    def __init__(self, command: Sequence[str], code: int, reason: str, *, is_buildkit: bool = False) -> None:
        """``is_buildkit``: Whether to use BuildKit's words."""
        words = " ".join(command)
        text = f"The command '{words}' returned a non-zero code: {code}"
        if is_buildkit:
            text = f'process "{words}" did not complete successfully: exit code: {code}'
        super().__init__(f"{text}: {reason}" if reason else text)
        self.code = code


class StepLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the containers of ``RUN`` steps.  0 means no limit."""

    memory_bytes: int = 0
    nano_cpus: int = 0
    shm_bytes: int = 64 << 20
    ulimits: tuple[Ulimit, ...] = ()


class WantedStep(msgspec.Struct, frozen=True, kw_only=True):
    """Step to look up in a cache source."""

    key: str
    """Shared key of the step (``results.StepKey``)."""
    diff_ids: tuple[str, ...] = ()
    """Layers of the image before the step."""
    config: bytes | None = None
    """Configuration of the image before the step.  None after ``FROM scratch``."""
    command: tuple[str, ...] = ()
    """Command of the step's container, as the history has it."""
    adds_layer: bool | None = None
    """Whether the step must add a layer (True) or must not (False).  None if only running the step can tell."""


class FoundStep(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a step in a cache source.  ``created``: A Timestamp."""

    created: str
    diff_id: str = ""
    """The layer that the step adds.  Empty if it adds none."""
    blob: Digest = Digest("")
    size: int = 0


class StepSource(Protocol):
    """Cache source with step results, usually of another node.  Its data is not trusted."""

    @property
    def name(self) -> str:
        """Name for messages."""

    def find(self, step: WantedStep) -> FoundStep | None:
        """Return the step's result, if the source has one on top of the same layers."""

    async def fetch(self, found: FoundStep, chain_id: Digest) -> None:
        """Put the layer of a result into the image store.  Raises: SkepError, OSError: it is missing or wrong."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Completed step, as a cache for other nodes records it."""

    key: str
    parent: str = ""
    """Shared key of the previous step in its stage or base stage.  The base image's id, or empty, for a first step."""
    diff_ids: tuple[Digest, ...] = ()
    """Layers of the image after the step."""
    created: str = ""


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One build."""

    dockerfile: str
    """Text of the Dockerfile."""
    tags: tuple[Reference, ...] = ()
    """Names that the image gets together once all steps have succeeded."""
    target: str = ""
    """Name or number of the stage to build.  Empty for the last one."""
    arguments: Mapping[str, str | None] = {}
    """Values of ``--build-arg``, or None to use the Dockerfile's default."""
    labels: Mapping[str, str] = {}
    use_cache: bool = True
    stages_without_cache: tuple[str, ...] = ()
    """Names, in lower case, of stages whose steps are not taken from the cache."""
    step_sources: tuple[StepSource, ...] = ()
    """Cache sources for steps that are not in this node's cache."""
    only_sources: bool = False
    """Whether steps come only from ``step_sources``, as in classic builds with ``--cache-from``."""
    inline_cache: bool = False
    """Whether the image's configuration records the steps of the build, so that the image is a cache source."""
    images: Mapping[str, str] = {}
    """Images by the lower-case names that stand for them in FROM and ``--from``."""
    directories: Mapping[str, OpenContext] = {}
    """Named contexts by the lower-case names that stand for them in ``--from``."""
    pull: bool = False
    """Pull the images of FROM even when they are on this node."""
    network: str = ""
    """Network of ``RUN`` steps: default, none, host, or a network's name."""
    has_host_network: bool = False
    """Whether a step may use ``RUN --network=host``."""
    hostname: str = ""
    """Host name of ``RUN`` steps.  Empty for the container's default."""
    cache_namespace: str = ""
    """Namespace of the directories of ``RUN --mount=type=cache``."""
    epoch_s: int | None = None
    """``SOURCE_DATE_EPOCH``: upper limit of all times in the image and its history, or None for no limit."""
    rewrites_times: bool = False
    """Whether ``epoch_s`` also limits the times of files in the layers."""
    hosts: tuple[str, ...] = ()
    """``--add-host``: ``name:address``."""
    limits: StepLimits = StepLimits()
    credentials: Mapping[str, str] = {}
    """``X-Registry-Auth`` values by registry (``docker.io``, ``registry:5000``)."""
    platform: str = ""
    """Platform of the image.  Empty for the base image's, or this machine's without a base image."""
    is_buildkit: bool = False
    """Whether BuildKit's language applies (RUN --mount, COPY --link) and unneeded stages are skipped."""


class BuildStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step, for display."""

    number: int
    """Number of the step, from 1."""
    total: int
    text: str
    """The instruction with variables substituted: ``RUN make``."""
    stage: int = 0
    stage_name: str = ""


class Progress(Protocol):
    """Receives a build's events in order.  Methods never wait."""

    def started(self, step: BuildStep) -> None:
        """Report that the step started."""

    def cached(self, step: BuildStep) -> None:
        """Report that the step's result was found in the cache.  ``finished`` follows."""

    def pulling(self, step: BuildStep, message: ProgressMessage) -> None:
        """Report progress of the pull of a stage's image."""

    def running(self, step: BuildStep, container_id: str) -> None:
        """Report that a container was created for the step."""

    def output(self, step: BuildStep, stream: StandardStream, data: bytes) -> None:
        """Report output of the step's command."""

    def removed(self, step: BuildStep, container_id: str) -> None:
        """Report that the step's container was removed."""

    def warning(self, step: BuildStep, text: str) -> None:
        """Report a warning for the author of the Dockerfile."""

    def finished(self, step: BuildStep, image_id: Digest | None) -> None:
        """Report that the step succeeded.

        ``image_id``: The image after the step.  Empty after ``FROM scratch``, None before the first stage.
        """

    def failed(self, step: BuildStep, error: Exception) -> None:
        """Report that the step failed, and the build with it."""


class Provider(Protocol):
    """Client of a build, for ``RUN --mount`` and registry credentials."""

    async def secret(self, id: str) -> bytes | None:
        """Return the content of a secret, or None if the client has none with this id.  Raises: SkepError."""

    async def credentials(self, domain: str) -> str:
        """Return the ``X-Registry-Auth`` value for a registry.  Empty if the client has none for it."""

    def ssh(self, id: str) -> AbstractAsyncContextManager[Path | None]:
        """Provide a socket of the client's ssh agent while the block runs.

        Yields None if the client does not forward an agent with this id.
        """


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a build.

    ``image_id``: Image of the target's last step.  ``unused_arguments``: Arguments that no ARG declares.
    """

    image_id: Digest
    unused_arguments: tuple[str, ...] = ()
    records: tuple[StepRecord, ...] = ()
    """Every step that ran or was found in the cache."""
    last: str = ""
    """Key of the target's last step, or the base image's id if the target has no steps."""


class Builds(Protocol):
    """Runs builds."""

    def env_of(self, name: str) -> Sequence[str] | None:
        """Return the variables of an image as ``NAME=value``.  None if the image is not on this node."""

    async def build(
        self,
        request: BuildRequest,
        context: OpenContext,
        progress: Progress,
        provider: Provider | None = None,
    ) -> BuildResult:
        """Build an image and tag it.  Cancellation ends the build's container and keeps only completed steps.

        Raises: SkepError: in Docker's words; nothing was tagged.
        """

    async def name_index(self, ids: Sequence[Digest], tags: Sequence[Reference]) -> Digest:
        """Name images for several platforms together, and return the image for this machine.

        Raises: NotFound: an image was removed meanwhile.
        """
