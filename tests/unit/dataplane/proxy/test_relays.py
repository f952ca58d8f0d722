"""One published port that cannot be relayed, or a plan that cannot be read, ends no other port."""

import asyncio
import socket
from pathlib import Path

import msgspec

from skep.dataplane.proxy.relay import Relays
from skep.dataplane.proxy.relays import RelayPort
from tests.support.oci_rig import QuickClock


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number: int = one.getsockname()[1]
        return number


async def answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def a_relay(port: int, address: str = "127.0.0.1") -> RelayPort:
    return RelayPort(protocol="tcp", address=address, port=port, backends=(("127.0.0.1", 1),))


async def test_a_port_that_cannot_be_and_a_plan_that_cannot_be_read_end_no_other_port(tmp_path: Path) -> None:
    plan, first, second = tmp_path / "relays", free_port(), free_port()
    plan.write_bytes(msgspec.json.encode([a_relay(70000), a_relay(first), a_relay(1, "odd\0address")]))
    relays = Relays(plan, QuickClock(), lambda: 0.5)
    running = asyncio.create_task(relays.run())
    async with asyncio.timeout(30):
        while not await answers(first):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        plan.write_bytes(b"\xff")
        await relays._apply()
        assert await answers(first)
        plan.write_bytes(msgspec.json.encode([a_relay(second)]))
        while not await answers(second) or await answers(first):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])
