"""Services on overlay networks compared with Docker's: 20 replicas created and removed, and a start with 500 services.

One node of each system, as in ``bench.run``, whose scenario this uses.  For the second part, one playground node has a
network with 5 and one with 500 services, on which one task is started alternately.
"""

import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.docker_lab import DockerLab
from bench.figures import Figure, alternate, ratio, run_alone, run_undisturbed
from bench.scenarios import SCENARIOS, clear, is_bare, on_overlay, running, service, wait_for
from bench.skep_lab import SkepLab
from skep.playground.images.busybox import busybox_archive

RATIO_MAX, BESIDE_MAX = 0.4, 1.2
"""Promised ratios: to Docker's time, and to a start with few services."""
FEW, MANY = 5, 500
_SCENARIO = "overlay20"
_SUBNETS = {FEW: "10.120.0.0/16", MANY: "10.121.0.0/16"}
_TURNS = 3
_POLL_S = 0.002


def figures(pairs: int) -> list[Figure]:
    """Compare with Docker, then with many services."""
    archive = asyncio.run(busybox_archive())
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory:
        docker, skep = DockerLab(Path(directory, "docker")), SkepLab(Path(directory, "skep"), "overlays")
        labs: dict[str, DockerLab | SkepLab] = {"docker": docker, "skep": skep}
        with ExitStack() as stack:
            for lab in labs.values():
                stack.callback(lab.down)
                lab.up(archive.data, archive.image_id)
            found = asyncio.run(_beside_docker(labs, pairs))
            docker.down()
            return [*found, asyncio.run(_beside_many(skep, pairs))]


async def _beside_docker(labs: dict[str, Any], pairs: int) -> list[Figure]:
    for lab in labs.values():  # the first container of a node has additional work
        await asyncio.to_thread(SCENARIOS["start1"], lab)

    async def one(number: int) -> dict[str, dict[str, float]]:
        order = list(labs) if number % 2 else list(reversed(labs))
        return {name: await asyncio.to_thread(SCENARIOS[_SCENARIO], labs[name]) for name in order}

    values, busy = await run_undisturbed(pairs, one)
    return [
        ratio(
            0 if "processor" in metric else 6,
            f"service beside Docker's: {metric}",
            {name: [value[name][metric] for value in values] for name in labs},
            limit=None if "processor" in metric else RATIO_MAX,
            busy=busy,
        )
        for metric in values[0]["skep"]
    ]


async def _beside_many(lab: SkepLab, pairs: int) -> Figure:
    networks = {count: on_overlay(lab, f"beside{count}", subnet) for count, subnet in _SUBNETS.items()}
    for count, network in networks.items():
        for number in range(count):
            service(lab, f"idle{count}-{number}", 0, Networks=[{"Target": network}])

    def started(count: int) -> float:
        """Return the milliseconds from the request until a task runs."""
        began = time.perf_counter()
        id = service(lab, "started", 1, Networks=[{"Target": networks[count]}])
        wait_for(lambda: bool(running(lab, id)), poll_s=_POLL_S)
        took = (time.perf_counter() - began) * 1e3
        lab.engine.delete(f"/services/{id}")
        wait_for(lambda: not lab.engine.get("/tasks") and is_bare(lab))
        return took

    async def one(number: int) -> dict[int, float]:
        return await alternate([FEW, MANY], number, _TURNS, lambda count: asyncio.to_thread(started, count))

    await asyncio.to_thread(started, MANY)
    values, busy = await run_undisturbed(pairs, one)
    await asyncio.to_thread(clear, lab)
    return ratio(
        3,
        f"create 1 to running on a network of {MANY} services and of {FEW}, ms",
        {f"{count} services": [value[count] for value in values] for count in (FEW, MANY)},
        limit=BESIDE_MAX,
        busy=busy,
    )


if __name__ == "__main__":
    run_alone(__doc__, "overlay-services", figures)
