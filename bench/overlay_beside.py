"""Overlay networks compared with Docker's: one TCP stream between containers on two machines, alternately.

Both clusters are complete (a manager and a worker, a service with a task on each) and up at the same time.  Between
the two Skep nodes' containers there is also a bare VXLAN, created by hand as in ``bench.overlay``.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.cluster_lab import ClusterLab
from bench.figures import Figure, alternate, ratio, run_alone, run_undisturbed
from bench.overlay import SECONDS, THROUGHPUT_MIN, TURNS, bare_vxlan
from bench.overlay_tasks import Placed, create_network, create_service, placed, specification, wait_running
from bench.packets import packet_us
from bench.stream import gigabits

DOCKER_MIN = 1.1
"""Promised ratio to Docker's throughput."""
BARE, DOCKER, SKEP = "bare VXLAN", "Docker's overlay", "overlay"


def figures(pairs: int) -> list[Figure]:
    """Compare Skep's overlay with both."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        labs = {
            DOCKER: ClusterLab("docker", Path(directory, "docker"), 1, 1),
            SKEP: ClusterLab("skep", Path(directory, "skep"), 1, 1),
        }
        ends = {}
        for way, lab in labs.items():
            stack.callback(lab.down)
            lab.up()
            lab.form()
            requested = specification(
                lab, "ends", create_network(lab, "bench"), None, has_virtual_address=False
            )
            service = create_service(lab, requested)
            wait_running(lab, service, 2)
            ends[way] = placed(lab, service)
        return asyncio.run(_measure(ends, pairs))


async def _measure(ends: dict[str, list[Placed]], pairs: int) -> list[Figure]:
    nodes = [end.node for end in ends[SKEP]]
    await bare_vxlan(
        [Path(node.netns) for node in nodes], [node.addr for node in nodes], [end.netns for end in ends[SKEP]]
    )

    def way_of(way: str) -> tuple[Path, Path, str]:
        """Return the source and target namespaces, and the target's address."""
        target, source = ends[SKEP if way == BARE else way]
        return source.netns, target.netns, "10.88.0.5" if way == BARE else target.address

    async def measure_stream(way: str) -> float:
        return await asyncio.to_thread(gigabits, *way_of(way), SECONDS)

    async def measure_packet(way: str) -> float:
        return await asyncio.to_thread(packet_us, *way_of(way))

    async def one(number: int) -> tuple[dict[str, float], dict[str, float]]:
        ways = [BARE, DOCKER, SKEP]
        return await alternate(ways, number, TURNS, measure_stream), await alternate(
            ways, number, TURNS, measure_packet
        )

    values, busy = await run_undisturbed(pairs, one)

    def sides(which: int, *ways: str) -> dict[str, Sequence[float]]:
        return {way: [value[which][way] for value in values] for way in ways}

    stream, packet = (
        f"between whole nodes, {what}:"
        for what in ("one TCP stream, Gbit/s", "processor time of a packet in µs")
    )
    return [
        ratio(
            1,
            f"{stream} overlay beside a bare VXLAN",
            sides(0, BARE, SKEP),
            limit=THROUGHPUT_MIN,
            is_least=True,
            busy=busy,
        ),
        ratio(
            1,
            f"{stream} overlay beside Docker's",
            sides(0, DOCKER, SKEP),
            limit=DOCKER_MIN,
            is_least=True,
            busy=busy,
        ),
        ratio(0, f"{stream} Docker's beside a bare VXLAN", sides(0, BARE, DOCKER)),
        ratio(0, f"{packet} overlay beside a bare VXLAN", sides(1, BARE, SKEP)),
        ratio(0, f"{packet} overlay beside Docker's", sides(1, DOCKER, SKEP)),
    ]


if __name__ == "__main__":
    run_alone(__doc__, "overlay-beside", figures)
