"""Calls of BuildKit's control protocol that buildx makes: ``moby.buildkit.v1.Control`` and ``frontend.LLBBridge``.

Source: moby/buildkit, api/services/control/control.proto, frontend/gateway/pb; moby, builder/builder-next.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence

from google.protobuf.message import Message

from skep import __version__
from skep.aio.trees import walk_tree
from skep.engine.build.builder import Builder
from skep.engine.build.emulation import emulated, read_emulators
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.protocol.sessions import BuildSessions, SessionInfo
from skep.engine.buildkit.protocol.tunnel import carry
from skep.engine.buildkit.solver import Solver
from skep.engine.images.platforms import this_platform
from skep.errors import InvalidArgument, Unimplemented
from skep.rpc.headers import CallHeaders
from skep.rpc.server import ServerStream
from skep.rpc.serving import Both, ServedMethod, Streaming, UnaryHandler

_CONTROL = "/moby.buildkit.v1.Control/"
_BRIDGE = "/moby.buildkit.v1.frontend.LLBBridge/"

_VERSION = pb.BuildkitVersion(package="skep", version=__version__)
_BRIDGE_CAPS = (
    *("solve.base", "return", "proto.refarray", "frontend.caps", "gateway.evaluate"),
    *("frontend.inputs", "reference.output", "returnmap"),
)
_LLB_CAPS = ("source.image", "source.local", "exec.mount.bind", "file.base", "constraints", "platform")


class Control:
    """Serves the calls of one connection."""

    def __init__(self, sessions: BuildSessions, solver: Solver, builder: Builder) -> None:
        self._sessions = sessions
        self._solver = solver
        self._builder = builder

    def methods(self) -> Mapping[str, ServedMethod]:
        """Return all calls by their paths."""
        return {
            f"{_CONTROL}Session": Both(self._session),
            f"{_CONTROL}Solve": UnaryHandler(pb.SolveRequest, self._solve),
            f"{_CONTROL}Status": Streaming(pb.StatusRequest, self._status),
            f"{_CONTROL}DiskUsage": UnaryHandler(pb.DiskUsageRequest, self._disk_usage),
            f"{_CONTROL}Prune": Streaming(pb.PruneRequest, self._prune),
            f"{_CONTROL}ListWorkers": UnaryHandler(pb.ListWorkersRequest, self._list_workers),
            f"{_CONTROL}Info": UnaryHandler(pb.InfoRequest, self._info),
            f"{_CONTROL}ListenBuildHistory": Streaming(pb.BuildHistoryRequest, self._history),
            f"{_CONTROL}UpdateBuildHistory": UnaryHandler(pb.UpdateBuildHistoryRequest, self._update_history),
            f"{_BRIDGE}Ping": UnaryHandler(pb.PingRequest, self._ping),
            f"{_BRIDGE}Solve": UnaryHandler(pb.BridgeSolveRequest, self._bridge_solve),
            f"{_BRIDGE}Evaluate": UnaryHandler(pb.EvaluateRequest, self._evaluate),
            f"{_BRIDGE}Return": UnaryHandler(pb.ReturnRequest, self._bridge_return),
        }

    async def _solve(self, request: pb.SolveRequest, _call: CallHeaders) -> Message:
        return pb.SolveResponse(exporter_response=await self._solver.solve(request))

    async def _status(self, request: pb.StatusRequest, _call: CallHeaders) -> AsyncGenerator[Message, None]:
        async for event in self._solver.status(request.ref):
            yield event

    async def _session(self, stream: ServerStream) -> None:
        async with self._sessions.register(SessionInfo.of(stream.request.session)) as session:
            await session.keep_checking_while(carry(session, stream))

    async def _history(
        self, request: pb.BuildHistoryRequest, _call: CallHeaders
    ) -> AsyncGenerator[Message, None]:
        async for event in self._solver.history.listen(request):
            yield event

    async def _update_history(self, request: pb.UpdateBuildHistoryRequest, _call: CallHeaders) -> Message:
        self._solver.history.update(request)
        return pb.UpdateBuildHistoryResponse()

    async def _list_workers(self, _request: pb.ListWorkersRequest, _call: CallHeaders) -> Message:
        return pb.ListWorkersResponse(record=[self._record()])

    async def _info(self, _request: pb.InfoRequest, _call: CallHeaders) -> Message:
        return pb.InfoResponse(buildkit_version=_VERSION)

    async def _ping(self, _request: pb.PingRequest, _call: CallHeaders) -> Message:
        return pb.PongResponse(
            frontend_api_caps=[pb.ApiCap(id=id, enabled=True) for id in _BRIDGE_CAPS],
            llb_caps=[pb.ApiCap(id=id, enabled=True) for id in _LLB_CAPS],
            workers=[self._record()],
        )

    async def _bridge_solve(self, request: pb.BridgeSolveRequest, call: CallHeaders) -> Message:
        return await self._solver.bridge_solve(_build_of(call), request)

    async def _evaluate(self, _request: pb.EvaluateRequest, call: CallHeaders) -> Message:
        _build_of(call)  # results are complete when they are returned
        return pb.EvaluateResponse()

    async def _bridge_return(self, request: pb.ReturnRequest, call: CallHeaders) -> Message:
        return await self._solver.bridge_return(_build_of(call), request)

    async def _disk_usage(self, request: pb.DiskUsageRequest, _call: CallHeaders) -> Message:
        _refuse_filters(request.filter)
        return pb.DiskUsageResponse(record=await self._usage())

    async def _prune(self, request: pb.PruneRequest, _call: CallHeaders) -> AsyncGenerator[Message, None]:
        _refuse_filters(request.filter)
        for name in ("reserved_space", "max_used_space", "min_free_space"):
            if getattr(request, name):
                raise Unimplemented(f"a prune of the build cache with {name} is not supported")
        before = await self._usage()
        kept_ns = request.keep_duration
        since_ns = self._builder.clock.now_ns() - kept_ns if kept_ns else None
        gone, _freed = await self._builder.mounts.prune(since_ns)
        gone += await self._solver.contexts.prune(since_ns)
        for record in before:
            if record.id in gone:
                yield record

    async def _usage(self) -> Sequence[pb.UsageRecord]:
        """Return the directories of cache mounts, and kept contexts.  Results of steps are images."""
        mounts = await walk_tree(self._builder.mounts.sizes)
        records = [
            pb.UsageRecord(
                id=name,
                mutable=True,
                in_use=self._builder.mounts.is_used(name),
                size=size,
                record_type="exec.cachemount",
                description="directory of RUN --mount=type=cache",
            )
            for name, size in mounts.items()
        ]
        for name, size in self._solver.contexts.sizes().items():
            records.append(
                pb.UsageRecord(id=name, size=size, record_type="source.local", description="build context")
            )
        return records

    def _record(self) -> pb.WorkerRecord:
        # buildx exports caches and pushes only with a worker that has a snapshotter, under any name.
        prefix = "org.mobyproject.buildkit.worker"
        labels = {f"{prefix}.executor": "skep", f"{prefix}.snapshotter": "overlayfs"}
        here = this_platform()
        platforms = [
            pb.Platform(architecture=one.architecture, os=one.os, variant=one.variant)
            for one in (here, *emulated(read_emulators()))
        ]
        return pb.WorkerRecord(id="skep", labels=labels, platforms=platforms, buildkit_version=_VERSION)


def _refuse_filters(filters: Sequence[str]) -> None:
    """Refuse filters.  Raises: Unimplemented."""
    if any(filters):
        raise Unimplemented(f"filters of the build cache are not supported: {', '.join(filters)}")


def _build_of(call: CallHeaders) -> str:
    if not call.build_id:
        raise InvalidArgument("the call names no build")
    return call.build_id
