"""Progress of a build for BuildKit's clients: vertices that start and end, transfer figures, output, warnings.

A build's log is kept while it runs and shortly afterwards.  Its output is bounded like BuildKit's.

Source: moby/buildkit, util/progress, solver/llbsolver/ops/exec.go (limits of output).
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from skep.engine.build.addresses import shown
from skep.engine.build.interface import BuildStep
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.containers.container import StandardStream
from skep.engine.images.digest import Digest
from skep.engine.images.progress import ProgressMessage

OUTPUT_BYTES_MAX = 2 << 20
"""Output of one vertex, as in BuildKit."""
LOG_BYTES_MAX = 64 << 20
"""Size of one build's log."""

_DONE = ("Pull complete", "Download complete", "Already exists")


class BuildLog:
    """All events of one build.  Any number of readers can follow them from the start."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        """Encoded events, because objects would take ten times as much memory."""
        self._bytes = 0
        self._waker: asyncio.Event = asyncio.Event()
        self.has_ended = False

    def add(self, event: pb.StatusResponse) -> None:
        """Append an event without waiting.  Beyond the bound, only changes of vertices are kept."""
        encoded = event.SerializeToString()
        self._bytes += len(encoded)
        if self._bytes <= LOG_BYTES_MAX or event.vertexes:
            self._events.append(encoded)
            self._wake()

    @property
    def size_bytes(self) -> int:
        """Size of the kept events."""
        return sum(map(len, self._events))

    def end(self) -> None:
        """End the log: no further events will follow."""
        self.has_ended = True
        self._wake()

    async def follow(self) -> AsyncIterator[pb.StatusResponse]:
        """Yield all events, including future ones, until the end."""
        position = 0
        while True:
            while position < len(self._events):
                position += 1
                yield pb.StatusResponse.FromString(self._events[position - 1])
            if self.has_ended:
                return
            await self._waker.wait()

    def _wake(self) -> None:
        waker, self._waker = self._waker, asyncio.Event()
        waker.set()


class StepCounts(msgspec.Struct):
    """Counters of a build's steps, for its record."""

    total: int = 0
    completed: int = 0
    cached: int = 0
    warnings: int = 0


class Vertices:
    """Reports the vertices of one build: its own work, and (as ``Progress``) the steps of the Dockerfile."""

    def __init__(self, ref: str, log: BuildLog, now_ns: Callable[[], int]) -> None:
        self._ref = ref
        self._log = log
        self._now_ns = now_ns
        self._vertices: dict[str, pb.Vertex] = {}
        self._output: dict[str, int] = {}
        self._platform = ""
        self._steps_before = 0
        self.counts = StepCounts()

    # -- vertices of the build itself -------------------------------------------------------------------------------

    @contextmanager
    def doing(self, name: str) -> Iterator[str]:
        """Report a vertex that lasts as long as the block, and yield its digest.

        If the block fails, so does the vertex.
        """
        digest = self._begin(name, name)
        try:
            yield digest
        except BaseException as error:
            self._end(digest, str(error) or type(error).__name__)
            raise
        self._end(digest)

    def figure(self, vertex: str, id: str, current: int, total: int = 0, *, done: bool = False) -> None:
        """Report the progress of a transfer within a vertex, in bytes."""
        id = shown(id)
        status = pb.VertexStatus(id=id, vertex=vertex, name=id, current=current, total=total)
        status.timestamp.FromNanoseconds(self._now_ns())
        status.started.CopyFrom(self._vertices[vertex].started)
        if done:
            status.completed.CopyFrom(status.timestamp)
        self._log.add(pb.StatusResponse(statuses=[status]))

    def warn(self, vertex: str, text: str, detail: Sequence[str] = (), url: str = "") -> None:
        """Add a warning for the author of the Dockerfile."""
        self.counts.warnings += 1
        warning = pb.VertexWarning(vertex=vertex, level=1, short=shown(text).encode(), url=url)
        warning.detail.extend(shown(line).encode() for line in detail)
        self._log.add(pb.StatusResponse(warnings=[warning]))

    def fail_open(self, reason: str) -> None:
        """End the vertices that are still open, since the build is over."""
        for digest, vertex in self._vertices.items():
            if not vertex.HasField("completed"):
                self._end(digest, reason)

    def begin_platform(self, name: str) -> None:
        """Show the platform before the names of further steps.  One platform is built after the other."""
        self._platform = f"{name} "
        self._steps_before = self.counts.total

    # -- Progress --------------------------------------------------------------------------------------------------

    def started(self, step: BuildStep) -> None:
        """Report that the step has started."""
        self.counts.total = max(self.counts.total, self._steps_before + step.total)
        self._begin(self._key(step), self._name(step))

    def cached(self, step: BuildStep) -> None:
        """Report that the step's result was found in the cache.  ``finished`` follows."""
        self.counts.cached += 1
        vertex = self._vertices[self._digest(self._key(step))]
        vertex.cached = True

    def pulling(self, step: BuildStep, message: ProgressMessage) -> None:
        """Report the progress of an image's pull."""
        detail = message.progress_detail
        if message.id and detail is not None:
            digest = self._digest(self._key(step))
            self.figure(digest, message.id, detail.current, detail.total, done=message.status in _DONE)

    def running(self, step: BuildStep, container_id: str) -> None:
        """Do nothing: BuildKit's clients do not show containers."""

    def removed(self, step: BuildStep, container_id: str) -> None:
        """Do nothing: BuildKit's clients do not show containers."""

    def output(self, step: BuildStep, stream: StandardStream, data: bytes) -> None:
        """Report output of the step's command."""
        digest = self._digest(self._key(step))
        before = self._output.get(digest, 0)
        self._output[digest] = before + len(data)
        if before >= OUTPUT_BYTES_MAX:
            return
        if before + len(data) > OUTPUT_BYTES_MAX:
            data = data[: OUTPUT_BYTES_MAX - before] + b"\n[output clipped, log limit 2MiB reached]\n"
        log = pb.VertexLog(vertex=digest, stream=stream.value, msg=data)
        log.timestamp.FromNanoseconds(self._now_ns())
        self._log.add(pb.StatusResponse(logs=[log]))

    def warning(self, step: BuildStep, text: str) -> None:
        """Add a warning for the author of the Dockerfile."""
        self.warn(self._digest(self._key(step)), text)

    def finished(self, step: BuildStep, image_id: Digest | None) -> None:
        """Report that the step has succeeded."""
        self.counts.completed += 1
        self._end(self._digest(self._key(step)))

    def failed(self, step: BuildStep, error: Exception) -> None:
        """Report that the step, and with it the build, has failed."""
        self._end(self._digest(self._key(step)), str(error))

    # -- internals --------------------------------------------------------------------------------------------------

    def _key(self, step: BuildStep) -> str:
        return f"{self._platform}{step.stage}/{step.number}"

    def _name(self, step: BuildStep) -> str:
        """Return the step's name as BuildKit shows it: ``[2/5] RUN make``, after the names of platform and stage."""
        stage = f"{step.stage_name} " if step.stage_name else ""
        return f"[{self._platform}{stage}{step.number}/{step.total}] {step.text}"

    def _digest(self, key: str) -> str:
        return "sha256:" + hashlib.sha256(f"{self._ref}/{key}".encode()).hexdigest()

    def _begin(self, key: str, name: str) -> str:
        digest = self._digest(key)
        vertex = self._vertices[digest] = pb.Vertex(digest=digest, name=shown(name))
        vertex.started.FromNanoseconds(self._now_ns())
        self._report(vertex)
        return digest

    def _end(self, digest: str, error: str = "") -> None:
        vertex = self._vertices.get(digest)
        if vertex is None or vertex.HasField("completed"):
            return
        vertex.completed.FromNanoseconds(self._now_ns())
        vertex.error = shown(error)
        self._report(vertex)

    def _report(self, vertex: pb.Vertex) -> None:
        copy = pb.Vertex()
        copy.CopyFrom(vertex)
        self._log.add(pb.StatusResponse(vertexes=[copy]))
