"""Ports of the node that are relayed to containers, on the sockets by which they are held."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.ports import Reservations, bind
from skep.dataplane.proxy.host_ports import HostRelays

TARGET = ("127.0.0.1", 9)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Reservations]:
    made = Reservations(tmp_path / "ports", {})
    yield made
    for opened in made.sockets():
        opened.close()


async def test_ports_that_are_reserved_together_are_free_again_once_they_are_released(
    held: Reservations,
) -> None:
    relays = HostRelays(SystemClock())

    async def reserved(token: str) -> int:
        port = held.reserve("tcp", 0, token, "::1", TARGET)
        await relays.serve(held.held)
        return port

    ports = await asyncio.gather(*(reserved(str(number)) for number in range(3)))
    for port in ports:
        await relays.end("tcp", port, "::1")
        held.release("tcp", port, "::1")
    await asyncio.sleep(0)
    for port in ports:
        bind("tcp", port, "::1").close()


async def test_a_port_that_is_released_while_it_is_opened_is_free_again(held: Reservations) -> None:
    relays = HostRelays(SystemClock())
    port = held.reserve("tcp", 0, "a", "::1", TARGET)
    opening = asyncio.create_task(relays.serve(held.held))
    await asyncio.sleep(0)
    await relays.end("tcp", port, "::1")
    held.release("tcp", port, "::1")
    await opening
    bind("tcp", port, "::1").close()
