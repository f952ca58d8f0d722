"""The forwarder process: applies the plan that it finds on tmpfs, then those it is told, until SIGTERM.

It is a process of its own so that neither a busy node process delays frames nor a restart of it stops them.
"""

import asyncio
import os
import random
import signal
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import structlog

from skep import logs
from skep.aio.clock import SystemClock
from skep.aio.guard import explain, report
from skep.dataplane.encrypted.forwarder import TICK_S, Forwarder
from skep.dataplane.encrypted.plan import Plan
from skep.dataplane.encrypted.protocol import (
    FRAME_BYTES_MAX,
    Answer,
    Apply,
    Ask,
    Now,
    Refused,
    Request,
    decode_request,
    frame,
)
from skep.dataplane.ipc import read_frame, serve
from skep.errors import SkepError
from skep.linux.files import replace_file
from skep.node.supervision.detached import detached
from skep.paths import Paths

log = structlog.get_logger(__name__)

NAME = "forwarder"
_PREDECESSOR_ENDS_S = 5.0
_NICENESS = -10
"""What the kernel forwards waits for no process either: busy containers are not to slow down the network of all."""


def enter(arguments: Sequence[str]) -> None:
    """What the zygote forks; ``arguments``: data and run directory."""
    logs.name_process(NAME)
    data, run_directory = map(Path, arguments)
    paths = Paths(data, run_directory)
    logs.follow(paths.log_settings)
    run(paths)


def run(paths: Paths) -> None:
    """Be the forwarder of this node.  Blocks until SIGTERM."""
    with detached(paths, NAME, lock_wait_s=_PREDECESSOR_ENDS_S):
        with suppress(PermissionError):  # CAP_SYS_NICE: without it, it is one process among others
            os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
        asyncio.run(_serve(paths))


async def _serve(paths: Paths) -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    clock = SystemClock()
    forwarder = Forwarder(os.urandom, random.random, clock.monotonic)
    conversations: set[asyncio.StreamWriter] = set()
    all_closed = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.add(writer)
        try:
            while (body := await read_frame(reader, FRAME_BYTES_MAX)) is not None:
                writer.write(frame(_answered(paths, forwarder, decode_request(body))))
                await writer.drain()
        except (SkepError, msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            log.warning("conversation ended", reason=str(error))
        finally:
            conversations.discard(writer)
            writer.close()
            if not conversations:
                all_closed.set()

    async def tick() -> None:
        while True:
            forwarder.tick()
            await clock.sleep(TICK_S)

    _resume(paths, forwarder)
    server = await serve(converse, paths.forwarder_socket)
    try:
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(tick(), name="tick")
            with closing(server):  # only that: waiting for it would be waiting for the conversations
                log.info("forwarder serves")
                await over.wait()
            ticking.cancel()
    finally:
        forwarder.close()
    all_closed.clear()
    for writer in tuple(conversations):
        writer.close()
    if conversations:
        await all_closed.wait()


def _answered(paths: Paths, forwarder: Forwarder, request: Request) -> Answer:
    try:
        return _answer(paths, forwarder, request)
    except Exception as error:  # a plan that cannot be is no reason to carry nothing
        report(error, "request not answered")
        return Refused(explain(error))


def _answer(paths: Paths, forwarder: Forwarder, request: Request) -> Answer:
    match request:
        case Apply(plan):
            replace_file(paths.forwarder_plan, msgspec.msgpack.encode(plan), mode=0o600, is_durable=False)
            try:
                forwarder.apply(plan)
            except OSError as error:
                return Refused(f"{plan.address} port {plan.port}/udp: {error.strerror or error}")
            return Now(forwarder.status())
        case Ask():
            return Now(forwarder.status())


def _resume(paths: Paths, forwarder: Forwarder) -> None:
    """Go on with what the predecessor was told."""
    try:
        plan = msgspec.msgpack.decode(paths.forwarder_plan.read_bytes(), type=Plan)
        forwarder.apply(plan)
    except FileNotFoundError:
        return
    except Exception as error:  # the node process says it again
        report(error, "plan not resumed")
