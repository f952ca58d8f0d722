"""The net process: takes over from its predecessor, then answers requests on ``net.sock`` until SIGTERM."""

import asyncio
import random
import resource
import secrets
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from typing import NamedTuple

import msgspec
import structlog

from skep.aio.clock import SystemClock
from skep.aio.failures import retry
from skep.dataplane.net_process import handover
from skep.dataplane.net_process.client import MESH
from skep.dataplane.net_process.handover import Taken
from skep.dataplane.net_process.ipc import read_frame, serve
from skep.dataplane.net_process.protocol import (
    FRAME_BYTES_MAX,
    Done,
    ForgetContainer,
    HandedOver,
    HandOverSockets,
    List,
    Refresh,
    ReleasePort,
    Request,
    RequestRefused,
    Reserve,
    Reserved,
    Response,
    Serve,
    ServedListing,
    WaitingQuery,
    decode_request,
    frame,
)
from skep.dataplane.net_process.served_containers import ServedContainers
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.ports import AddressNotHere, Outside, Reservations, reopened
from skep.dataplane.proxy.host_ports import HostRelays
from skep.dataplane.proxy.relay import ConnectionRelays
from skep.errors import AlreadyExists, SkepError
from skep.linux.detached import detached
from skep.linux.own_user_namespace import rootlesskit_state
from skep.paths import Paths

log = structlog.get_logger()

_PREDECESSOR_ENDS_S = 5.0
"""Time limit in seconds for an earlier process to end after it has handed over its sockets."""


class Ports(NamedTuple):
    """The node's reserved ports, and the relays of their traffic."""

    held: Reservations
    relays: HostRelays
    mesh: ConnectionRelays


def run(paths: Paths, other_work: Sequence[Callable[[], Awaitable[None]]] = ()) -> None:
    """Run as the net process of this node.  Blocks until SIGTERM, or until a successor has taken over.

    ``other_work`` also runs here, because it must continue while the node process is down.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # the number of sockets grows with the containers: three for each
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    taken = handover.take(paths.net_socket)
    with detached(
        "net",
        lock=paths.lock_file("net"),
        pid_file=paths.pid_file("net"),
        lock_wait_s=_PREDECESSOR_ENDS_S,
    ):
        if taken is None:
            taken = Taken(reopened(paths.net_ports))
        reservations = Reservations(paths.net_ports, dict(taken.held), _machine_ports())
        asyncio.run(_run(paths, reservations, taken, other_work))


def _machine_ports() -> Outside | None:
    """Return the ports of the machine, or None on a node that is not rootless."""
    if (state := rootlesskit_state()) is None:
        return None
    from skep.dataplane.rootless_ports import MachinePorts  # imported here: few nodes are rootless

    return MachinePorts(state / "api.sock")


async def _run(
    paths: Paths,
    reservations: Reservations,
    taken: Taken,
    other_work: Sequence[Callable[[], Awaitable[None]]],
) -> None:
    tasks: set[asyncio.Task[None]] = set()
    namespaces, host_relays = Namespaces(paths.netns), HostRelays(SystemClock())
    async with asyncio.TaskGroup() as group:

        def start_task(work: Awaitable[None]) -> asyncio.Task[None]:
            task = group.create_task(_kept_apart(work))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            return task

        serving = ServedContainers(
            paths,
            namespaces,
            clock=SystemClock(),
            rng=random.random,
            new_id=lambda: secrets.randbits(16),
            start_task=start_task,
        )
        try:
            await host_relays.serve(reservations.held)
            relays = ConnectionRelays(
                paths.relays,
                SystemClock(),
                random.random,
                lambda: [one for one in reservations.held() if one[0].owner == MESH],
            )
            start_task(retry(relays.run, "relays of ports failed", clock=SystemClock()))
            start_task(reservations.keep_outside(SystemClock(), random.random))
            for work in other_work:
                start_task(work())
            serving.take_over(taken.named, taken.waiting)
            await _serve(paths, Ports(reservations, host_relays, relays), serving)
        finally:
            host_relays.close()
            serving.close()
            for task in tasks:
                task.cancel()
            namespaces.close()


async def _kept_apart(work: Awaitable[None]) -> None:
    """Await the work for one container and log its failure, which must not end other work or the process."""
    try:
        await work
    except Exception:
        log.exception("work for a container failed unexpectedly")


async def _serve(paths: Paths, ports: Ports, serving: ServedContainers) -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    open_now: set[asyncio.StreamWriter] = set()
    all_closed = asyncio.Event()
    is_leaving = False  # later requests are for the next process, and clients retry

    async def serve_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal is_leaving
        open_now.add(writer)
        try:
            while (
                not is_leaving
                and (body := await read_frame(reader, FRAME_BYTES_MAX)) is not None
                and not is_leaving
            ):
                request = decode_request(body)
                if isinstance(request, HandOverSockets):
                    is_leaving = True
                    try:
                        await _hand_over(writer, ports.held, serving)
                    except OSError:
                        is_leaving = False
                        raise
                    over.set()
                    break
                writer.write(frame(await _answer(request, ports, serving)))
                await writer.drain()
        except (SkepError, msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            log.warning("connection ended by an error", reason=str(error))
        finally:
            writer.close()
            open_now.discard(writer)
            if not open_now:
                all_closed.set()

    server = await serve(serve_connection, paths.net_socket)
    with closing(server):  # do not wait until the server is closed, because that waits for its connections
        ports.held.record()
        log.info("net process ready", ports=len(ports.held.list()), containers=len(serving.list()))
        await over.wait()
        is_leaving = True
    all_closed.clear()
    for writer in open_now:
        writer.close()
    if open_now:
        await all_closed.wait()


async def _hand_over(
    writer: asyncio.StreamWriter, reservations: Reservations, serving: ServedContainers
) -> None:
    """Hand everything over to the successor at the other end.

    Raises: OSError: it did not take over, and this process continues.
    """
    waiting: tuple[WaitingQuery, ...] = serving.pause()
    try:
        named = serving.sockets()
        # the sockets are sent outside the stream, after the whole response
        writer.transport.set_write_buffer_limits(0)
        writer.write(frame(HandedOver(tuple(reservations.list()), tuple(named), waiting)))
        await writer.drain()
        handover.give(writer.get_extra_info("socket"), (*named.values(), *reservations.sockets()))
    except OSError:
        serving.resume(waiting)
        raise


async def _answer(request: Request, ports: Ports, serving: ServedContainers) -> Response:
    match request:
        case Reserve(kind, port, token, address, target):
            try:
                reserved = ports.held.reserve(kind, port, token, address, target)
                await ports.relays.serve(ports.held.held)
                return Reserved(reserved)
            except SkepError as error:
                return RequestRefused(
                    str(error),
                    is_taken=isinstance(error, AlreadyExists),
                    is_elsewhere=isinstance(error, AddressNotHere),
                )
        case ReleasePort(kind, port, address, owner):
            if not ports.held.has(kind, port, address, owner):
                return Done()  # perhaps another owner has got it since
            await ports.relays.end(kind, port, address)
            ports.mesh.end(kind, port, address)
            ports.held.release(kind, port, address)
            return Done()
        case List():
            held, served = tuple(ports.held.list()), tuple(serving.list())
            return ServedListing(held, served, serving.repairs.total, serving.counts())
        case Serve(named):
            return await _finish(serving.serve(named))
        case ForgetContainer(id):
            serving.forget(id)
            return Done()
        case Refresh(networks):
            return await _finish(serving.refresh(networks))
        case HandOverSockets():
            raise AssertionError("HandOver is handled by the connection's loop")


async def _finish(work: Awaitable[None]) -> Done | RequestRefused:
    try:
        await work
    except SkepError as error:
        return RequestRefused(str(error), is_taken=False)
    return Done()
