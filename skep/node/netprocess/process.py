"""The net process itself: takes over from its predecessor, then answers on ``net.sock`` until SIGTERM."""

import asyncio
import os
import random
import signal
from contextlib import closing

import msgspec
import structlog

from skep.aio.clock import SystemClock
from skep.errors import AlreadyExists, SkepError
from skep.node.netprocess import handover
from skep.node.netprocess.protocol import (
    Answer,
    Done,
    HandedOver,
    HandOver,
    List,
    Listing,
    Refused,
    Release,
    Request,
    Reserve,
    Reserved,
    decode_request,
    frame,
    read_frame,
)
from skep.node.netprocess.reservations import Reservations, reopened
from skep.node.network.ingress.relay import Relays
from skep.node.network.ports import AddressNotHere
from skep.node.supervision.detached import detached
from skep.paths import Paths

log = structlog.get_logger()

_PREDECESSOR_ENDS_S = 5.0


def run(paths: Paths) -> None:
    """Be the net process of this node.  Blocks until SIGTERM, or until a successor has taken over."""
    held = handover.take(paths.net_socket)
    with detached(paths, "net", lock_wait_s=_PREDECESSOR_ENDS_S):
        reservations = Reservations(paths.net_ports, reopened(paths.net_ports) if held is None else held)
        asyncio.run(_run(paths, reservations))


async def _run(paths: Paths, reservations: Reservations) -> None:
    async with asyncio.TaskGroup() as group:
        relays = Relays(paths.relays, SystemClock(), random.random)
        relaying = group.create_task(relays.run(), name="relays")
        try:
            await _serve(paths, reservations)
        finally:
            relaying.cancel()


async def _serve(paths: Paths, reservations: Reservations) -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    open_now: set[asyncio.StreamWriter] = set()
    all_closed = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.add(writer)
        try:
            while (body := await read_frame(reader)) is not None:
                request = decode_request(body)
                writer.write(frame(_answer(request, reservations)))
                await writer.drain()
                if isinstance(request, HandOver):
                    handover.give(writer.get_extra_info("socket"), tuple(reservations.sockets()))
                    over.set()
                    break
        except (SkepError, msgspec.DecodeError, OSError) as error:
            log.warning("conversation ended", reason=str(error))
        finally:
            writer.close()
            open_now.discard(writer)
            if not open_now:
                all_closed.set()

    paths.net_socket.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(converse, paths.net_socket)
    finally:
        os.umask(mask)
    with closing(server):  # only that: waiting for it would be waiting for the conversations
        reservations.write_down()
        log.info("net process serves", ports=len(reservations.list()))
        await over.wait()
    all_closed.clear()
    for writer in open_now:
        writer.close()
    if open_now:
        await all_closed.wait()


def _answer(request: Request, reservations: Reservations) -> Answer:
    match request:
        case Reserve(kind, port, token, address):
            try:
                return Reserved(reservations.reserve(kind, port, token, address))
            except SkepError as error:
                return Refused(
                    str(error),
                    is_taken=isinstance(error, AlreadyExists),
                    is_elsewhere=isinstance(error, AddressNotHere),
                )
        case Release(kind, port, address):
            reservations.release(kind, port, address)
            return Done()
        case List():
            return Listing(tuple(reservations.list()))
        case HandOver():
            return HandedOver(tuple(reservations.list()))
