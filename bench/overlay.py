"""Overlay networks of skep nodes: throughput beside a bare VXLAN, attaching beside many services, memory.

::

    .venv/bin/python -m bench.overlay                     # seven pairs, kept in results/
    .venv/bin/python -m bench.overlay --pairs 3 --seconds 1

Two nodes are network namespaces joined by a cable, each with the production code for containers' networks.
*Throughput*: one TCP stream from a container's namespace on one node to one on the other, by the overlay and by a VXLAN
device that is made by hand right in the same two namespaces, in turn.  *Attach*: until a container's namespace has its
place on a network with 5 and with 500 services, whose tasks are on the other node, in turn.  *Memory*: what the node
process grows by for each of 100 attached containers.
"""

import argparse
import asyncio
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.machine import noise, resident_mib
from bench.run import commit, result_name, write_result
from skep.aio.clock import SystemClock
from skep.model.ids import NetworkId, NodeId, TaskId, new_container_id
from skep.model.tables import NetworkHead, Segment, Table, TableEndpoint, TableNode
from skep.node.executor.assembly import container_network
from skep.node.network.connecting import ContainerNetwork
from skep.node.network.namespaces import Namespaces
from skep.node.network.ports import OwnReservations
from skep.node.oci.container import Endpoint, Place
from skep.paths import Paths

PAIRS, SECONDS = 7, 2.0
FEW, MANY = 5, 500
ATTACHED = 60
CONTAINERS = 100
ADDRESSES = ("192.0.2.1", "192.0.2.2")
IDS = (NodeId("one"), NodeId("other"))
THROUGHPUT_MIN, ATTACH_MAX, MEMORY_MB_MAX = 0.95, 1.2, 0.2
"""The issue's limits: of a bare VXLAN's throughput, of attaching beside few services, per container."""

_SERVER = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 7001))
connection, _ = listener.accept()
buffer = bytearray(1 << 20)
total, began = 0, time.monotonic()
while got := connection.recv_into(buffer):
    total += got
print(total * 8 / (time.monotonic() - began) / 1e9)
"""
_CLIENT = """
import socket, sys, time
for _ in range(200):
    try:
        connection = socket.create_connection((sys.argv[1], 7001))
        break
    except OSError:
        time.sleep(0.01)
data, end = bytes(1 << 20), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    connection.sendall(data)
"""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Every single value."""

    bare_gbit_s: list[float]
    overlay_gbit_s: list[float]
    attach_few_ms: list[float]
    attach_many_ms: list[float]
    attach_few_processor_ms: list[float]
    attach_many_processor_ms: list[float]
    memory_mib_per_container: float
    busy: float

    @property
    def throughput(self) -> float:
        """Overlay by bare VXLAN: the median of the pairs' ratios."""
        return statistics.median(
            mine / bare for bare, mine in zip(self.bare_gbit_s, self.overlay_gbit_s, strict=True)
        )

    @property
    def attaching(self) -> float:
        """Beside many services by beside few."""
        return statistics.median(self.attach_many_ms) / statistics.median(self.attach_few_ms)

    @property
    def attaching_processor(self) -> float:
        """The same of processor time, which others on the machine disturb less."""
        return statistics.median(self.attach_many_processor_ms) / statistics.median(
            self.attach_few_processor_ms
        )


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each stream")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
        result = asyncio.run(_measure(Path(directory), options.pairs, options.seconds))
    text = report(result)
    print(text)
    write_result(result_name(datetime.now(UTC), commit(), "overlay"), text, msgspec.to_builtins(result))


def report(result: Result) -> str:
    """The table."""

    def spread(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    rows = [
        "| what | beside | Skep | ratio | limit |",
        "|---|---|---|---|---|",
        (
            f"| one TCP stream, Gbit/s | bare VXLAN {spread(result.bare_gbit_s)} | {spread(result.overlay_gbit_s)} "
            f"| {result.throughput:.2f} | at least {THROUGHPUT_MIN} |"
        ),
        (
            f"| attach, ms, {MANY} services | {FEW} services {spread(result.attach_few_ms)} "
            f"| {spread(result.attach_many_ms)} | {result.attaching:.2f} | at most {ATTACH_MAX} |"
        ),
        (
            f"| the same, processor time | {spread(result.attach_few_processor_ms)} "
            f"| {spread(result.attach_many_processor_ms)} | {result.attaching_processor:.2f} | |"
        ),
        f"| node process per container, MiB | | {result.memory_mib_per_container:.3f} | | under {MEMORY_MB_MAX} |",
        "",
        f"The machine was {result.busy:.0%} busy with other things before.",
    ]
    return "\n".join(rows) + "\n"


async def _measure(directory: Path, pairs: int, seconds: float) -> Result:
    busy = noise()
    async with AsyncExitStack() as stack:
        homes = Namespaces(directory / "homes")
        stack.callback(homes.close)
        networks, spaces = [], []
        for number, id in enumerate(IDS):
            home = await homes.create(f"n{number}", {})
            stack.push_async_callback(homes.destroy, f"n{number}")
            space = Namespaces(directory / f"n{number}" / "run" / "netns", home)
            spaces.append(space)
            paths = Paths(directory / f"n{number}" / "data", directory / f"n{number}" / "run")
            ports = OwnReservations(space)
            stack.callback(ports.close)
            network = container_network(
                paths, namespaces=space, ports=ports, clock=SystemClock(), chance=random.random
            )
            network.overlays.identify(id)
            networks.append(network)
        await _cable([space.home for space in spaces])
        for network in networks:
            await stack.enter_async_context(network.running())
            await network.restore({})
        bare, mine = await _streams(networks, pairs, seconds)
        wall, processor = await _attaching(networks[0])
        memory = await _memory(networks[0])
    return Result(
        bare_gbit_s=bare,
        overlay_gbit_s=mine,
        attach_few_ms=wall[FEW],
        attach_many_ms=wall[MANY],
        attach_few_processor_ms=processor[FEW],
        attach_many_processor_ms=processor[MANY],
        memory_mib_per_container=memory,
        busy=busy,
    )


async def _streams(
    networks: Sequence[ContainerNetwork], pairs: int, seconds: float
) -> tuple[list[float], list[float]]:
    head = a_head(1)
    ids, ends = [], []
    for number, network in enumerate(networks, 5):
        ids.append(new_container_id())
        ends.append(
            await network.attach(ids[-1], (), (Place(head=head, addresses=(f"10.101.0.{number}/16",)),))
        )
    await _apply(networks, a_table(head, [(IDS[0], "10.101.0.5"), (IDS[1], "10.101.0.6")]))
    for number, end in enumerate(ends):
        other = ADDRESSES[1 - number]
        await _shell(
            f"nsenter --net={networks[number].home} ip link add bare netns {end.netns} mtu 1450"
            f" type vxlan id 77 dstport 4799 local {ADDRESSES[number]} remote {other}"
        )
        await _shell(
            f"nsenter --net={end.netns} sh -c 'ip addr add 10.88.0.{number + 5}/24 dev bare; ip link set bare up'"
        )
    bare, mine = [], []
    for pair in range(pairs):
        for way in ("bare", "overlay") if pair % 2 else ("overlay", "bare"):
            address = "10.88.0.6" if way == "bare" else "10.101.0.6"
            rate = await _stream(ends[1], ends[0], address, seconds)
            (bare if way == "bare" else mine).append(rate)
    for id, end, network in zip(ids, ends, networks, strict=True):
        await network.detach(id, end)
    await _apply(networks)
    return bare, mine


async def _attaching(network: ContainerNetwork) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """One container after another, in turn on a network with few services and on one with many; ms.

    By number of services: as the clock says, and of processor time.
    """
    heads = {FEW: a_head(2), MANY: a_head(3)}
    tables = [
        a_table(
            head,
            [
                (IDS[1], f"10.{_second(head)}.{number // 200 + 1}.{number % 200 + 1}")
                for number in range(count)
            ],
        )
        for count, head in heads.items()
    ]
    await _apply([network], *tables)
    taken: dict[int, list[float]] = {FEW: [], MANY: []}
    spent: dict[int, list[float]] = {FEW: [], MANY: []}
    for number in range(-2, ATTACHED):  # the first ones make what is there once
        for count in (FEW, MANY) if number % 2 else (MANY, FEW):
            head, id = heads[count], new_container_id()
            place = Place(head=head, addresses=(f"10.{_second(head)}.9.{number + 10}/16",))
            began, busy = time.perf_counter(), time.process_time()
            end = await network.attach(id, (), (place,))
            if number >= 0:
                taken[count].append((time.perf_counter() - began) * 1e3)
                spent[count].append((time.process_time() - busy) * 1e3)
            await network.detach(id, end)
    await _apply([network])
    return taken, spent


async def _memory(network: ContainerNetwork) -> float:
    head = a_head(4)
    await _apply([network], a_table(head, []))
    ends = {}

    async def attach(numbers: range) -> None:
        for number in numbers:
            id = new_container_id()
            place = Place(head=head, addresses=(f"10.{_second(head)}.1.{number}/16",))
            ends[id] = await network.attach(id, (), (place,))

    await attach(range(1, 21))  # what is loaded and kept once
    gc.collect()
    before = resident_mib()
    await attach(range(21, 21 + CONTAINERS))
    gc.collect()
    after = resident_mib()
    for id, end in ends.items():
        await network.detach(id, end)
    await _apply([network])
    return (after - before) / CONTAINERS


def a_head(number: int) -> NetworkHead:
    """The network ``10.<100 + number>.0.0/16``."""
    segment = Segment(f"10.{100 + number}.0.0/16", f"10.{100 + number}.255.1", 5000 + number)
    return NetworkHead(id=NetworkId(f"net{number}"), name=f"net{number}", segments=(segment,))


def _second(head: NetworkHead) -> str:
    return head.segments[0].subnet.split(".")[1]


def a_table(head: NetworkHead, endpoints: Sequence[tuple[NodeId, str]]) -> Table:
    """A table of both nodes with an endpoint for each (node, address)."""
    return Table(
        head=head,
        nodes={id: TableNode(id=id, underlay=address) for id, address in zip(IDS, ADDRESSES, strict=True)},
        endpoints={
            TaskId(f"{head.id}-{address}"): TableEndpoint(
                task_id=TaskId(f"{head.id}-{address}"), node_id=node, addresses=(address,)
            )
            for node, address in endpoints
        },
    )


async def _apply(networks: Sequence[ContainerNetwork], *tables: Table) -> None:
    named = {table.head.id: table for table in tables}
    everything = frozenset(NetworkId(f"net{number}") for number in range(1, 5))
    for network in networks:
        await network.overlays.apply(named, everything)


async def _cable(homes: Sequence[Path]) -> None:
    await _shell(f"nsenter --net={homes[0]} ip link add under type veth peer name under netns {homes[1]}")
    for home, address in zip(homes, ADDRESSES, strict=True):
        await _shell(
            f"nsenter --net={home} sh -c 'ip addr add {address}/24 dev under; ip link set under up; ip link set lo up'"
        )


async def _stream(server: Endpoint, client: Endpoint, address: str, seconds: float) -> float:
    """Gbit/s of one TCP connection."""
    receiving = await _python(server, _SERVER, address)
    sending = await _python(client, _CLIENT, address, str(seconds))
    async with asyncio.timeout(seconds + 20):
        output, _ = await receiving.communicate()
        await sending.wait()
    return float(output)


async def _python(end: Endpoint, code: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "nsenter",
        f"--net={end.netns}",
        sys.executable,
        "-c",
        code,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
    )


async def _shell(command: str) -> None:
    process = await asyncio.create_subprocess_shell(command)
    if await process.wait():
        raise SystemExit(f"failed: {command}")


if __name__ == "__main__":
    main()
