"""Builds of BuildKit's clients: from a request and its session to an image, with all progress reported.

A build is one *job*, named by its client (``ref``).  buildx requests it in two calls.  ``Control.Solve`` selects the
exports and waits.  ``LLBBridge.Solve`` starts the build.  The former ends when the client has returned the result of
the latter (``LLBBridge.Return``).

Source: moby/buildkit, control/control.go, client/solve.go, client/build.go, frontend/gateway.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from skep.aio.clock import Clock
from skep.aio.race import LostRace, run_unless
from skep.engine.build.addresses import redacted, redacted_address, shown, shown_errors
from skep.engine.build.dockerfile.checks import EnvOf
from skep.engine.build.dockerfile.patterns import ignored_patterns
from skep.engine.build.interface import BuildResult, Builds, OpenContext, StepSource
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit import requests
from skep.engine.buildkit.caches import Caches
from skep.engine.buildkit.contexts import ContextStore
from skep.engine.buildkit.definitions import (
    IGNORE_BYTES_MAX,
    IGNORE_FILE,
    Definition,
    build_request,
    names_of,
    read_definition,
    read_in,
)
from skep.engine.buildkit.options import (
    BuildOptions,
    BuildOutput,
    ClientDirectory,
    Exported,
    cache_entries,
    check_cache_exports,
    check_entitlements,
    check_network,
    exported,
    parse_options,
)
from skep.engine.buildkit.progress import BuildLog, Vertices
from skep.engine.buildkit.protocol.filesend import OpenArchive, send_archive, send_tree, spool
from skep.engine.buildkit.protocol.filesync import SyncSelection
from skep.engine.buildkit.protocol.sessions import BuildSession, BuildSessions
from skep.engine.buildkit.provider import ClientProvider
from skep.engine.buildkit.remote_contexts import named_context, remote_context, uploaded_context
from skep.engine.buildkit.results import BuildHistory, BuiltImages, image_of
from skep.engine.buildkit.uploads import OpenUpload
from skep.engine.images.digest import Digest
from skep.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from skep.rpc.status import CallFailed, StatusCode, status_of

JOBS_MAX = 32
"""Number of simultaneous builds."""
ENDED_JOBS_MAX = 8
"""Number of ended builds whose log is kept, since a client may ask for it after its build has ended."""
ENDED_LOGS_BYTES_MAX = 64 << 20
"""Maximum size of all kept logs.  The latest log is always kept."""
_JOB_WAIT_S = 15.0
"""Seconds to wait for a job: a client may ask for a build's progress, or call it, before it has started."""
_DEFINITION_BYTES_MAX = 16 << 20
"""Maximum size of the Dockerfile and the files fetched with it."""


class BuildJob:
    """One build from its request to its end."""

    def __init__(
        self, request: pb.SolveRequest, now_ns: Callable[[], int], upload: OpenUpload | None = None
    ) -> None:
        """``upload``: Opens the archive of the context, if the client uploads one."""
        self.request = request
        self.upload = upload
        self.log = BuildLog()
        self.vertices = Vertices(request.ref, self.log, now_ns)
        self.exported = Exported()
        self.cache_imports, self.cache_exports = cache_entries(request.cache)
        self.built: dict[Digest, BuildResult] = {}
        self.results: dict[str, BuiltImages] = {}
        """Images by the names under which the client returns results."""
        self.returned: asyncio.Future[pb.ReturnRequest] = asyncio.get_running_loop().create_future()
        self.started_ns = now_ns()
        self.ended_ns = 0
        self.ended = asyncio.Event()
        self.error = ""
        self.response: Mapping[str, str] = {}

    def record(self) -> pb.BuildHistoryRecord:
        """Return the build's current record for the history."""
        counts = self.vertices.counts
        record = pb.BuildHistoryRecord(
            ref=self.request.ref,
            frontend=self.request.frontend,
            frontend_attrs={
                name: redacted_address(value)
                if name.startswith(("context", "cache-from"))
                else redacted(value)
                for name, value in self.request.frontend_attrs.items()
            },
            exporters=[
                pb.Exporter(type=one.type, attrs={name: redacted(value) for name, value in one.attrs.items()})
                for one in self.request.exporters
            ],
            exporter_response=self.response,
            num_cached_steps=counts.cached,
            num_total_steps=counts.total,
            num_completed_steps=counts.completed,
            num_warnings=counts.warnings,
        )
        record.created_at.FromNanoseconds(self.started_ns)
        if self.ended_ns:
            record.completed_at.FromNanoseconds(self.ended_ns)
        if self.error:
            record.error.code, record.error.message = StatusCode.UNKNOWN, self.error
        return record


class Solver:
    """All builds that clients of BuildKit's protocol requested."""

    def __init__(
        self,
        builds: Builds,
        archives: OpenArchive,
        sessions: BuildSessions,
        contexts: ContextStore,
        caches: Caches,
        clock: Clock,
        job_wait_s: float = _JOB_WAIT_S,
    ) -> None:
        self._builds = builds
        self._job_wait_s = job_wait_s
        self._archives = archives
        self._caches = caches
        self._sessions = sessions
        self.contexts = contexts
        self._clock = clock
        self._jobs: dict[str, BuildJob] = {}
        self._ended: OrderedDict[str, BuildJob] = OrderedDict()
        self.history = BuildHistory()
        self._begun = asyncio.Condition()

    # -- calls of clients ---------------------------------------------------------------------------------------------

    async def solve(self, request: pb.SolveRequest, upload: OpenUpload | None = None) -> Mapping[str, str]:
        """Run a build and return the exporter's response.  Raises: SkepError; nothing is tagged then.

        ``upload``: See ``BuildJob``.
        """
        async with self._job(request, upload) as job:
            _check(request)
            session = await self._sessions.get(request.session)
            try:
                job.response = await run_unless(self._run(job, session), session.wait_closed())
            except LostRace as error:
                raise Unavailable("the client of the build disconnected") from error
            return job.response

    async def bridge_solve(self, ref: str, request: pb.BridgeSolveRequest) -> pb.BridgeSolveResponse:
        """Build for a client of the job ``ref``.  The client then returns the job's result.

        Raises: NotFound: the job has ended, so the result could not be exported; SkepError.
        """
        job = await self.job(ref)
        if job.ended.is_set():
            raise NotFound(f"no such job {ref}")
        if request.definition.ByteSize():
            raise Unimplemented("LLB definitions are not supported, only Dockerfiles")
        session = await self._sessions.get(job.request.session)
        response = pb.BridgeSolveResponse()
        inputs = {name: image_of(one) for name, one in request.frontend_inputs.items()}
        try:
            with shown_errors():
                wanted = parse_options(request.frontend, request.frontend_opt, inputs)
                if wanted.request:
                    found = await run_unless(self._respond(job, session, wanted), job.ended.wait())
                    response.result.metadata.update(found)
                    return response
                work = self._build(job, session, wanted, request.frontend_opt)
                built = await run_unless(work, job.ended.wait())
        except LostRace as error:
            raise Unavailable(f"job {ref} has ended") from error
        result, names = built.describe(lambda: secrets.token_hex(12))
        response.result.CopyFrom(result)
        job.results |= dict.fromkeys(names, built)
        return response

    async def bridge_return(self, ref: str, request: pb.ReturnRequest) -> pb.ReturnResponse:
        """Record the client's result or failure."""
        job = await self.job(ref)
        if not job.returned.done():
            job.returned.set_result(request)
        return pb.ReturnResponse()

    async def job(self, ref: str) -> BuildJob:
        """Return a job, after a short wait if it has not started yet.  Raises: NotFound."""
        if job := self._ended.get(ref):
            return job
        try:
            async with asyncio.timeout(self._job_wait_s), self._begun:
                await self._begun.wait_for(lambda: ref in self._jobs)
                return self._jobs[ref]
        except TimeoutError as error:
            raise NotFound(f"no such job {ref}") from error

    async def status(self, ref: str) -> AsyncGenerator[pb.StatusResponse, None]:
        """Yield a build's progress from its start to its end.  Raises: NotFound."""
        job = await self.job(ref)
        async for event in job.log.follow():
            yield event

    # -- jobs ---------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _job(self, request: pb.SolveRequest, upload: OpenUpload | None) -> AsyncIterator[BuildJob]:
        if request.ref in self._jobs or request.ref in self._ended:
            raise AlreadyExists(f"job ID {request.ref} exists")
        if len(self._jobs) >= JOBS_MAX:
            raise ResourceExhausted(f"there are {JOBS_MAX} builds already")
        job = self._jobs[request.ref] = BuildJob(request, self._clock.now_ns, upload)
        try:
            job.exported = exported(_exporters(request))
            check_cache_exports(job.cache_exports)
            self._record(job)
            async with self._begun:
                self._begun.notify_all()
            with shown_errors():
                yield job
        except BaseException as error:
            job.error = shown(str(error)) or "canceled"
            raise
        finally:
            job.ended_ns = self._clock.now_ns()
            job.ended.set()
            job.vertices.fail_open(job.error or "canceled")
            job.log.end()
            self._record(job)
            del self._jobs[request.ref]
            self._ended[request.ref] = job
            while len(self._ended) > ENDED_JOBS_MAX or (
                len(self._ended) > 1
                and sum(one.log.size_bytes for one in self._ended.values()) > ENDED_LOGS_BYTES_MAX
            ):
                self._ended.popitem(last=False)

    def _record(self, job: BuildJob) -> None:
        if not job.request.internal:
            self.history.keep(job.record())

    async def _run(self, job: BuildJob, session: BuildSession) -> Mapping[str, str]:
        request = job.request
        if request.frontend:
            build = parse_options(request.frontend, request.frontend_attrs)
            built: BuiltImages | None = await self._build(job, session, build, request.frontend_attrs)
        else:
            built = _returned(job, await job.returned)
        if built is None:
            return {}
        response: Mapping[str, str] = {}
        if job.exported.output is BuildOutput.IMAGE:
            response = self._exported(job, built)
            if job.exported.is_pushed:
                provider = ClientProvider(session, self.contexts.scratch)
                tags = job.exported.tags
                pushed = await self._caches.push(job.vertices, provider, built, tags)
                response = {**response, "containerimage.digest": pushed}
        elif job.exported.output is not BuildOutput.NONE:
            for platform, image in built.images.items():
                await self._send(job, session, image, platform)
        return {**response, **await self._export_caches(job, session, built)}

    async def _export_caches(
        self, job: BuildJob, session: BuildSession, built: BuiltImages
    ) -> Mapping[str, str]:
        """Export the build's steps to the destinations of ``--cache-to``.  Raises: SkepError."""
        results = [job.built[id] for id in built.images.values() if id in job.built]
        if not job.cache_exports or not results:
            return {}
        provider = ClientProvider(session, self.contexts.scratch)
        return await self._caches.export(job.vertices, session, provider, job.cache_exports, results)

    async def _send(self, job: BuildJob, session: BuildSession, image: Digest, platform: str) -> None:
        """Send the files of an image to the client.  Raises: SkepError.

        ``platform``: Platform of one of several images, whose files get a directory of their own.
        """
        is_tar = job.exported.output is BuildOutput.TAR
        directory = platform.replace("/", "_") if job.exported.is_split else ""
        with job.vertices.doing(f"exporting to client {'tarball' if is_tar else 'directory'}") as vertex:
            shown = "sending tarball" if is_tar else "copying files"
            progress = partial(job.vertices.figure, vertex, shown)
            async with self._archives(image) as pieces:
                if is_tar:
                    await send_archive(session, pieces, progress)
                    return
                async with self.contexts.scratch() as place:
                    file = place / "result"
                    await spool(pieces, file, self.contexts.room_on(place))
                    await send_tree(session, file, progress, below=directory)

    def _exported(self, job: BuildJob, built: BuiltImages) -> Mapping[str, str]:
        export, image = job.exported, built.here
        with job.vertices.doing("exporting to image") as vertex:
            for done in (
                *(f"writing image {id}" for id in built.images.values()),
                *(f"naming to {tag}" for tag in export.tags),
            ):
                job.vertices.figure(vertex, done, 0, done=True)
        names = ",".join(map(str, export.tags))
        digests = {"containerimage.digest": image, "containerimage.config.digest": image}
        return {**digests, "image.name": names} if names else digests

    # -- one build ----------------------------------------------------------------------------------------------------

    async def _build(
        self, job: BuildJob, session: BuildSession, build: BuildOptions, attributes: Mapping[str, str]
    ) -> BuiltImages:
        check_network(build, job.request.entitlements)
        job.request.frontend_attrs.update(attributes)  # for the job's record
        if build.request:
            raise Unimplemented(f"unsupported request {build.request}")
        if build.is_index and job.exported.output is BuildOutput.TAR:
            raise Unimplemented("output tar is not supported for multiple platforms: use local")
        provider = ClientProvider(session, self.contexts.scratch)
        async with AsyncExitStack() as received:
            remote = await self._remote(job, session, build, provider, received)
            client = await self._session_of(session, build.dockerfile)
            definition = await self._definition(job, client, build, remote)

            def opening(files: AbstractAsyncContextManager[Path], root: Path | None = None) -> OpenContext:
                opened: list[Path] = [root] if root is not None else []

                async def open_context() -> Path:
                    if not opened:  # the builds of all platforms use the same files
                        opened.append(await received.enter_async_context(files))
                    return opened[0]

                return open_context

            further = {name: self._context(job, session, one) for name, one in build.directories.items()}
            further |= {
                name: self._remote_directory(job, provider, name, at) for name, at in build.remotes.items()
            }
            request = msgspec.structs.replace(
                build_request(
                    build,
                    job.exported,
                    definition.text,
                    has_host_network="network.host" in job.request.entitlements,
                ),
                directories={name: opening(files) for name, files in further.items()},
                inline_cache=build.inline_cache or any(one.type == "inline" for one in job.cache_exports),
            )
            files = self._context(job, session, build.context, definition.ignored)
            open_context = opening(files, remote[0] if remote else None)
            images: dict[str, Digest] = {}
            for platform in build.platforms:
                if build.is_index:
                    job.vertices.begin_platform(platform)
                sources = await self._step_sources(job, session, build, provider, platform)
                one = msgspec.structs.replace(request, platform=platform, step_sources=sources)
                work = self._builds.build(one, open_context, job.vertices, provider)
                try:
                    result = await run_unless(work, session.wait_closed())
                except LostRace as error:
                    raise Unavailable("the client of the build disconnected") from error
                job.built[result.image_id] = result
                images[platform if build.is_index else ""] = result.image_id
        if not build.is_index:
            return BuiltImages(images, result.image_id)
        return BuiltImages(images, await self._builds.name_index(tuple(images.values()), job.exported.tags))

    async def _step_sources(
        self,
        job: BuildJob,
        session: BuildSession,
        build: BuildOptions,
        provider: ClientProvider,
        platform: str,
    ) -> tuple[StepSource, ...]:
        """Open the sources of ``--cache-from``.  They never fail a build."""
        if not build.use_cache:
            return ()
        # buildx names the same sources in both places.
        entries = (*build.cache_sources, *job.cache_imports)
        return await self._caches.sources(job.vertices, session, provider, entries, platform)

    async def _respond(
        self, job: BuildJob, session: BuildSession, build: BuildOptions
    ) -> Mapping[str, bytes]:
        """Respond to a request that does not build.  Raises: SkepError."""
        provider = ClientProvider(session, self.contexts.scratch)
        async with AsyncExitStack() as received:
            remote = await self._remote(job, session, build, provider, received)
            client = await self._session_of(session, build.dockerfile)
            text = (await self._definition(job, client, build, remote)).text
        env_of = await self._envs(text, build)
        return await asyncio.to_thread(requests.answer, text, build, build.request, env_of)

    async def _envs(self, text: str, build: BuildOptions) -> EnvOf:
        """Read the variables of the base images here: the image store belongs to the event loop's thread."""
        names = await asyncio.to_thread(requests.base_names, text, build)
        return {name: self._builds.env_of(name) for name in names}.get

    async def _session_of(self, session: BuildSession, source: ClientDirectory) -> BuildSession:
        return await self._sessions.get(source.session) if source.session else session

    async def _remote(
        self,
        job: BuildJob,
        session: BuildSession,
        build: BuildOptions,
        provider: ClientProvider,
        stack: AsyncExitStack,
    ) -> tuple[Path, str] | None:
        """Fetch a context outside the client's directories, as ``remote_context`` does.  None without one."""
        if not build.remote and job.upload is None:
            return None
        with job.vertices.doing("[internal] load remote build context") as vertex:
            progress = partial(job.vertices.figure, vertex, "transferring context:")
            if job.upload is not None:
                return await stack.enter_async_context(uploaded_context(self.contexts, job.upload, progress))
            return await stack.enter_async_context(
                remote_context(
                    self.contexts,
                    session,
                    build.remote,
                    provider,
                    keeps_git_dir=build.keeps_git_dir,
                    progress=progress,
                )
            )

    async def _definition(
        self,
        job: BuildJob,
        session: BuildSession,
        build: BuildOptions,
        remote: tuple[Path, str] | None = None,
    ) -> Definition:
        """Read the Dockerfile.  Raises: SkepError: neither the client nor a remote context has it."""
        if remote is not None and not build.has_own_dockerfile:
            root, name = remote
            with job.vertices.doing(f"[internal] load build definition from {build.filename}") as vertex:
                definition = await asyncio.to_thread(read_definition, root, name or build.filename)
                await self._check_text(job, vertex, build, definition.text)
            return definition
        names = names_of(build.filename)
        with job.vertices.doing(f"[internal] load build definition from {build.filename}") as vertex:
            async with self.contexts.receive(
                session,
                SyncSelection(name=build.dockerfile.name, follow=names),
                bytes_max=_DEFINITION_BYTES_MAX,
                progress=partial(job.vertices.figure, vertex, "transferring dockerfile:"),
            ) as root:
                definition = await asyncio.to_thread(read_definition, root, build.filename)
            job.vertices.figure(vertex, "transferring dockerfile:", len(definition.text), done=True)
            await self._check_text(job, vertex, build, definition.text)
        return definition

    async def _check_text(self, job: BuildJob, vertex: str, build: BuildOptions, text: str) -> None:
        """Report check findings as warnings.  Raises: InvalidArgument: the checks are configured to fail the build."""
        if build.request:
            return  # the response has the findings
        env_of = await self._envs(text, build)
        found, failure = await asyncio.to_thread(requests.findings_of_build, text, build, env_of)
        for one in found:
            job.vertices.warn(vertex, one.summary, [one.description], one.url)
        if failure:
            raise InvalidArgument(failure)

    @asynccontextmanager
    async def _context(
        self, job: BuildJob, session: BuildSession, source: ClientDirectory, ignored: str | None = None
    ) -> AsyncIterator[Path]:
        """Provide the files of a context while the block runs.  Raises: SkepError."""
        session = await self._session_of(session, source)
        which = "build context" if source.name == "context" else f"context {source.name}"
        if ignored is None:
            with job.vertices.doing(f"[internal] load .dockerignore of the {which}"):
                only = SyncSelection(name=source.name, follow=(IGNORE_FILE,))
                async with self.contexts.receive(session, only, bytes_max=IGNORE_BYTES_MAX) as root:
                    ignored = await asyncio.to_thread(read_in, root, IGNORE_FILE, IGNORE_BYTES_MAX) or ""
        async with AsyncExitStack() as stack:
            with job.vertices.doing(f"[internal] load {which}") as vertex:
                received = self.contexts.receive(
                    session,
                    SyncSelection(name=source.name, excludes=tuple(ignored_patterns(ignored))),
                    progress=partial(job.vertices.figure, vertex, "transferring context:"),
                )
                root = await stack.enter_async_context(received)
            yield root

    @asynccontextmanager
    async def _remote_directory(
        self, job: BuildJob, provider: ClientProvider, name: str, address: str
    ) -> AsyncIterator[Path]:
        """Provide the files of a named context at an address while the block runs.  Raises: SkepError."""
        async with AsyncExitStack() as stack:
            with job.vertices.doing(f"[context {name}] {redacted_address(address)}"):
                root = await stack.enter_async_context(named_context(self.contexts, address, provider))
            yield root


def _exporters(request: pb.SolveRequest) -> Sequence[tuple[str, Mapping[str, str]]]:
    if request.exporters:
        return [(exporter.type, exporter.attrs) for exporter in request.exporters]
    return [(request.exporter, request.exporter_attrs)] if request.exporter else []


def _check(request: pb.SolveRequest) -> None:
    """Refuse unsupported options outside the front end's.  Raises: SkepError."""
    if not request.ref or not request.session:
        raise InvalidArgument("a build needs a reference and a session")
    if request.definition.ByteSize():
        raise Unimplemented("LLB definitions are not supported, only Dockerfiles")
    if request.frontend_inputs:
        raise Unimplemented("results of other builds as contexts are not supported")
    if request.source_policy.ByteSize():
        raise Unimplemented("source policies are not supported")
    check_entitlements(request.entitlements)


def _returned(job: BuildJob, response: pb.ReturnRequest) -> BuiltImages | None:
    """Return the images that the client returned, or None without one.  Raises: CallFailed: the client failed."""
    if response.HasField("error"):
        raise CallFailed(status_of(str(response.error.code)), response.error.message)
    names = [response.result.ref.id, *(one.id for one in response.result.refs.refs.values())]
    return next((job.results[name] for name in names if name in job.results), None)
