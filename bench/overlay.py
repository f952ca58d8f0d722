"""Overlay networks of Skep nodes: throughput compared with a bare VXLAN, attaching with many services, memory.

Two nodes are network namespaces on one switch, each with the production code for containers' networks. *Throughput*:
one TCP stream from a container's namespace on one node to one on the other, alternately by the overlay and by a VXLAN
device created by hand in the same two namespaces. *Attach*: the time until a container's namespace is attached to a
network with 5 and with 500 services, whose tasks are on the other node, alternately. *Memory*: growth of the node
process for each of 100 attached containers.
"""

import asyncio
import gc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.figures import Figure, alternate, ratio, run_alone, run_undisturbed
from bench.machine import resident_mib
from bench.packets import packet_us
from bench.stream import gigabits
from skep.dataplane.dataplane import DataPlane
from skep.model.networks.sandbox import Sandbox
from skep.model.networks.tables import NetworkHead, Segment, TableEndpoint
from skep.model.values.ids import NetworkId, TaskId
from tests.support.networks.overlay_lab import LabNode, OverlayLab, place, shell

SECONDS = 1.0
FEW, MANY = 5, 500
ATTACHED_PER_PAIR = 9
CONTAINERS = 100
THROUGHPUT_MIN, ATTACH_MAX, MEMORY_MB_MAX = 0.95, 1.2, 0.2
"""Promised limits: share of a bare VXLAN's throughput, ratio to attaching with few services, memory per container."""
TURNS = 3
"""Number of turns of each way, in one pair."""


class Attached(NamedTuple):
    """Costs of attaching one container."""

    wall_ms: float
    processor_ms: float


def figures(pairs: int) -> list[Figure]:
    """Measure throughput, attaching and memory."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
        return asyncio.run(_measure(Path(directory), pairs))


async def _measure(directory: Path, pairs: int) -> list[Figure]:
    async with OverlayLab(directory).running(2) as lab, lab.networks() as networks:
        return [
            *await _streams(lab, networks, pairs),
            *await _attaching(lab, networks[0], pairs),
            await _memory(lab, networks[0]),
        ]


async def _streams(lab: OverlayLab, networks: Sequence[DataPlane], pairs: int) -> list[Figure]:
    head = a_head(1)
    ends = [
        await node.attach(network, place(head, f"10.101.0.{number}/16"))
        for number, (node, network) in enumerate(zip(lab.nodes, networks, strict=True), 5)
    ]
    lab.tell(head)
    await lab.apply(networks)
    places = [Path(end.netns) for end in ends]
    await bare_vxlan([node.home for node in lab.nodes], [node.underlay for node in lab.nodes], places)
    target, source = places
    addresses = {"bare VXLAN": "10.88.0.5", "overlay": "10.101.0.5"}

    async def measure_stream(way: str) -> float:
        return await asyncio.to_thread(gigabits, source, target, addresses[way], SECONDS)

    async def measure_packet(way: str) -> float:
        return await asyncio.to_thread(packet_us, source, target, addresses[way])

    async def one(number: int) -> tuple[dict[str, float], dict[str, float]]:
        ways = list(addresses)
        return await alternate(ways, number, TURNS, measure_stream), await alternate(
            ways, number, TURNS, measure_packet
        )

    values, busy = await run_undisturbed(pairs, one)
    for node, network, end in zip(lab.nodes, networks, ends, strict=True):
        await node.detach(network, end)

    def sides(which: int) -> dict[str, list[float]]:
        return {way: [value[which][way] for value in values] for way in addresses}

    what = "overlay beside a bare VXLAN in the same namespaces"
    return [
        ratio(1, f"{what}, one TCP stream, Gbit/s", sides(0), limit=THROUGHPUT_MIN, is_least=True, busy=busy),
        ratio(0, f"{what}, processor time of a packet in µs", sides(1)),
    ]


async def bare_vxlan(homes: Sequence[Path], underlays: Sequence[str], ends: Sequence[Path]) -> None:
    """Create a VXLAN device by hand in the namespaces of two containers: 10.88.0.5 and 10.88.0.6.

    ``homes`` and ``underlays`` are their nodes' namespaces and addresses.  ``ends`` has the containers' namespaces.
    """
    for number, (home, underlay, end) in enumerate(zip(homes, underlays, ends, strict=True)):
        remote = underlays[1 - number]
        device = f"bare netns {end} mtu 1450"
        await shell(
            home,
            f"ip link add {device} type vxlan id 77 dstport 4788 local {underlay} remote {remote}",
        )
        await shell(end, f"ip addr add 10.88.0.{number + 5}/24 dev bare; ip link set bare up")


async def _attaching(lab: OverlayLab, network: DataPlane, pairs: int) -> list[Figure]:
    """Attach one container after another, alternately to a network with few services and to one with many."""
    heads = {FEW: a_head(2), MANY: a_head(3)}
    for count, head in heads.items():
        _tell_services(lab, head, count)
    await lab.apply([network])
    node = lab.nodes[0]

    async def measure_attach(head: NetworkHead, number: int) -> Attached:
        began, busy = time.perf_counter(), time.process_time()
        end = await node.attach(network, place(head, f"10.{_second(head)}.9.{number}/16"))
        taken = Attached((time.perf_counter() - began) * 1e3, (time.process_time() - busy) * 1e3)
        await node.detach(network, end)
        return taken

    for head in heads.values():  # the first container creates shared objects once
        await measure_attach(head, 9)

    async def one(number: int) -> dict[int, Attached]:
        taken: dict[int, list[Attached]] = {FEW: [], MANY: []}
        for turn in range(ATTACHED_PER_PAIR):
            for count in (FEW, MANY) if (number + turn) % 2 else (MANY, FEW):
                taken[count].append(await measure_attach(heads[count], 10 + turn))
        middle = ATTACHED_PER_PAIR // 2
        return {
            count: Attached(
                sorted(each.wall_ms for each in all_)[middle],
                sorted(each.processor_ms for each in all_)[middle],
            )
            for count, all_ in taken.items()
        }

    values, busy = await run_undisturbed(pairs, one)

    def sides(which: int) -> dict[str, list[float]]:
        return {f"{count} services": [value[count][which] for value in values] for count in (FEW, MANY)}

    what = f"attaching a container beside {MANY} services and beside {FEW}"
    return [
        ratio(3, f"{what}, ms", sides(0), limit=ATTACH_MAX, busy=busy),
        ratio(0, f"{what}, processor time in ms", sides(1)),
    ]


async def _memory(lab: OverlayLab, network: DataPlane) -> Figure:
    head, node = a_head(4), lab.nodes[0]
    lab.tell(head)
    await lab.apply([network])

    async def attach(numbers: range) -> list[Sandbox]:
        return [
            await node.attach(network, place(head, f"10.{_second(head)}.1.{number}/16")) for number in numbers
        ]

    ends = await attach(range(1, 21))  # load shared code and data once
    gc.collect()
    before = resident_mib()
    ends += await attach(range(21, 21 + CONTAINERS))
    gc.collect()
    grown = (resident_mib() - before) / CONTAINERS
    for end in ends:
        await node.detach(network, end)
    return Figure(
        number=4,
        what=f"node process, for each of {CONTAINERS} containers",
        unit="MiB",
        values=(grown,),
        limit=MEMORY_MB_MAX,
    )


def a_head(number: int) -> NetworkHead:
    """Return the network ``10.<100 + number>.0.0/16``."""
    segment = Segment(f"10.{100 + number}.0.0/16", f"10.{100 + number}.255.1", 5000 + number)
    return NetworkHead(id=NetworkId(f"net{number}"), name=f"net{number}", segments=(segment,))


def _second(head: NetworkHead) -> str:
    return head.segments[0].subnet.split(".")[1]


def _tell_services(lab: OverlayLab, head: NetworkHead, count: int) -> None:
    """Send a table with one task per service, on the other node."""
    addresses = [f"10.{_second(head)}.{number // 200 + 1}.{number % 200 + 1}" for number in range(count)]
    other: LabNode = lab.nodes[1]
    endpoints = {
        (task := TaskId(f"{head.id}-{address}")): TableEndpoint(
            task_id=task, node_id=other.id, addresses=(address,)
        )
        for address in addresses
    }
    lab.tables[head.id] = msgspec.structs.replace(lab.tell(head), endpoints=endpoints)


if __name__ == "__main__":
    run_alone(__doc__, "overlay", figures)
