"""What a build reports, kept for those that ask."""

import os

from skep.engine.build.interface import BuildStep
from skep.engine.buildkit.progress import BuildLog, Vertices
from skep.engine.containers.container import StandardStream


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_output_in_small_pieces_takes_little_memory_and_is_whole() -> None:
    log = BuildLog()
    vertices = Vertices("ref", log, lambda: 1_790_000_000_000_000_000)
    step = BuildStep(number=1, total=1, text="RUN yes")
    vertices.started(step)
    before = resident_bytes()
    for _ in range(100_000):
        vertices.output(step, StandardStream.STDOUT, b"y")
    assert resident_bytes() - before < 80 << 20  # 14 MiB of messages
    log.end()
    assert sum([len(one.msg) for event in [e async for e in log.follow()] for one in event.logs]) == 100_000
