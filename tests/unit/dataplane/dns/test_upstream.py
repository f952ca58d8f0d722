"""What containers that ask other name servers leave for each other."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from dnslib import DNSRecord

from skep.aio.clock import SystemClock
from skep.dataplane.dns.upstream import (
    CONTAINERS_MIN,
    LIMITS,
    ForwardedQuery,
    ForwardingLimits,
    QueryForwarder,
    UpstreamServer,
)
from skep.model.networks.dns_messages import REFUSED, Query, parse, response_code
from tests.support.networks import upstream as lab
from tests.support.networks.upstream import knows

QUESTION = bytes(DNSRecord.question("example.org").pack())


@asynccontextmanager
async def serving(answer: Callable[[DNSRecord], bytes | None]) -> AsyncIterator[UpstreamServer]:
    async with lab.upstream(answer) as server:
        yield UpstreamServer(server.address, server.port)


ALL_S = 0.5
"""Deadline of all attempts: the one attempt has to end before it also where the machine is busy."""


class Asking:
    """Containers with one forwarder."""

    def __init__(self, limits: ForwardingLimits = LIMITS) -> None:
        self.forwarder = QueryForwarder(SystemClock(), lambda: 7, limits)

    def ask(
        self, container: str, server: UpstreamServer, deadline_s: float = 60.0
    ) -> "asyncio.Task[bytes | None]":
        query = parse(QUESTION)
        assert isinstance(query, Query)

        async def inside(kind: socket.SocketKind, family: socket.AddressFamily) -> socket.socket:
            return socket.socket(family, kind)

        return asyncio.create_task(
            self.forwarder.forward(
                ForwardedQuery(container, query, QUESTION, inside, is_tcp=False), [server], deadline_s
            )
        )

    async def under_way(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.forwarder.in_flight != count:  # noqa: ASYNC110  # nobody is told
                await asyncio.sleep(0)


@pytest.fixture
async def silent() -> AsyncIterator[UpstreamServer]:
    async with serving(lambda _: None) as server:
        yield server


FEW = ForwardingLimits(in_flight=8, in_flight_per_container=4, attempt_s=60.0)


async def test_containers_that_ask_much_leave_room_for_others(silent: UpstreamServer) -> None:
    asking = Asking(FEW)
    hogs = [asking.ask(container, silent) for container in ("a", "b") for _ in range(4)]
    await asking.under_way(8)
    refused = await asking.ask("a", silent)
    assert refused is not None
    assert response_code(refused) == REFUSED
    async with serving(knows("192.0.2.1")) as good:
        answer = await asking.ask("c", good)
        assert answer is not None
        assert response_code(answer) == 0
    assert await hogs[0] is None  # the oldest of who asked most
    assert sum(hog.done() for hog in hogs) == 1
    others = [asking.ask(container, silent) for container in ("c", "d", "e", "f")]
    await asking.under_way(8)
    assert sum(one.done() for one in others) == 0
    for one in (*hogs, *others):
        one.cancel()
    await asyncio.wait([*hogs, *others])
    assert asking.forwarder.in_flight == 0
    assert asking.forwarder.in_flight_requests == {}


async def test_a_container_alone_has_no_more_than_its_limit(silent: UpstreamServer) -> None:
    asking = Asking(FEW)
    hogs = [asking.ask("a", silent) for _ in range(4)]
    await asking.under_way(4)
    refused = await asking.ask("a", silent)
    assert refused is not None
    assert response_code(refused) == REFUSED
    for one in hogs:
        one.cancel()
    await asyncio.wait(hogs)


async def test_a_client_with_the_largest_share_is_refused_when_all_slots_are_in_use(
    silent: UpstreamServer,
) -> None:
    asking = Asking(FEW)
    under_way = [asking.ask(container, silent) for container in "abcd" for _ in range(2)]
    await asking.under_way(8)
    answer = await asking.ask("a", silent)
    assert answer is not None
    assert response_code(answer) == REFUSED
    under_way.append(asking.ask("e", silent))  # it has none, and another two
    assert await under_way[0] is None
    await asking.under_way(8)
    for one in under_way:
        one.cancel()
    await asyncio.wait(under_way)


async def test_a_place_is_taken_from_a_question_whose_time_is_over_but_which_has_not_left_yet(
    silent: UpstreamServer,
) -> None:
    asking, loop = Asking(FEW), asyncio.get_running_loop()
    hogs = [asking.ask(container, silent, deadline_s=60.0) for container in ("a", "b") for _ in range(4)]
    await asking.under_way(8)
    oldest = next(iter(asking.forwarder.in_flight_requests["a"]))
    async with serving(knows("192.0.2.1")) as good:
        new: list[asyncio.Task[bytes | None]] = []
        loop.call_soon(lambda: new.append(asking.ask("c", good)))
        oldest.reschedule(loop.time())  # its time is over before that, and its turn to leave comes after it
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        answer = await new[0]
    assert answer is not None
    assert response_code(answer) == 0
    assert await hogs[0] is None
    for one in hogs:
        one.cancel()
    await asyncio.wait(hogs)
    assert asking.forwarder.in_flight == 0


async def test_a_server_that_leaves_one_containers_questions_is_silent_for_that_one_alone(
    silent: UpstreamServer,
) -> None:
    asking = Asking()
    for number in range(CONTAINERS_MIN):
        assert not asking.forwarder.are_unresponsive([silent], "other")
        assert await asking.ask(f"c{number}", silent, deadline_s=ALL_S) is None
        assert asking.forwarder.are_unresponsive([silent], f"c{number}")
    assert asking.forwarder.are_unresponsive([silent], "other")
    inside = UpstreamServer(silent.address, silent.port, is_inside=True)
    for number in range(CONTAINERS_MIN):
        assert await asking.ask(f"c{number}", inside, deadline_s=ALL_S) is None
    assert not asking.forwarder.are_unresponsive([inside], "other")


async def test_a_server_that_responds_to_one_container_counts_as_responsive_for_all() -> None:
    is_deaf = [True]
    async with serving(lambda question: None if is_deaf[0] else knows("192.0.2.1")(question)) as server:
        asking = Asking()
        for number in range(CONTAINERS_MIN):
            await asking.ask(f"c{number}", server, deadline_s=ALL_S)
        assert asking.forwarder.are_unresponsive([server], "other")
        is_deaf[0] = False
        assert await asking.ask("c0", server) is not None
        assert not any(asking.forwarder.are_unresponsive([server], one) for one in ("other", "c0", "c1"))
