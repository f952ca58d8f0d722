"""Measures builds of twenty steps against an earlier commit: new steps, and rebuilds without a change.

    python -m bench.rebuilds --before ../before

Both nodes build the same contexts in alternating pairs, by the classic builder and by BuildKit.  Seven pairs take less
than six minutes.  The processor time belongs to the node and its containers, so other programs hardly affect it.
"""

import asyncio
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from statistics import mean, median
from urllib.parse import urlencode

from bench.figures import Figure, ratio, run_against, side_by_side
from bench.machine import group_processor_s
from bench.run import BEFORE
from bench.scenarios import Metrics
from bench.skep_lab import SkepLab
from skep.playground.images.busybox import busybox_archive

STEPS = 20
REBUILDS = 5
"""Number of rebuilds in a pair.  A rebuild takes some 40 ms, and a pause of the machine would double it."""
LIMIT = 1.05
"""Largest ratio to the earlier commit.  The median of seven pairs is not more exact than 5 %."""


def _measure(pairs: int, before: Path) -> list[Figure]:
    archive = asyncio.run(busybox_archive())
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        place = Path(directory)
        # The first side is what the second one is divided by.
        labs = (
            SkepLab(place / BEFORE, BEFORE, before / ".venv/bin/skep"),
            SkepLab(place / "skep", "rebuilds"),
        )
        labs[0].system = BEFORE
        for lab in labs:
            stack.callback(lab.down)
            lab.up(archive.data, archive.image_id)
        sides, busy = side_by_side(labs, pairs, _Builds(place / "context").measure)
    return [
        ratio(1 if what.endswith(", s") else 0, what, values, limit=LIMIT, busy=busy)
        for what, values in sides.items()
    ]


_BUILDX = Path(sys.prefix) / "libexec" / "skep" / "docker-buildx"
"""Docker's plugin, which ``make setup`` installs."""


class _Builds:
    """Builds whose first step differs each time, so that no step of an earlier build is reused."""

    def __init__(self, context: Path) -> None:
        """``context`` is the directory for the build context."""
        self._context = context
        self._numbers = count()
        rng = random.Random(20)
        for number in range(200):
            path = context / "src" / f"{number % 10}" / f"{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rng.randbytes(2500).hex())
        for name in ("requirements.txt", "settings.ini"):
            (context / name).write_text("".join(f"package-{rng.randrange(1000)}\n" for _ in range(100)))

    def measure(self, lab: SkepLab) -> Metrics:
        """Return the seconds and processor seconds of both builders, for new steps and for the same steps again."""
        found: Metrics = {}
        for builder, build in (("classic", _build_classically), ("BuildKit", _build_by_buildkit)):
            (self._context / "Dockerfile").write_text(_dockerfile(next(self._numbers)))
            turns = {f"{STEPS} steps": 1, "no-change rebuild": REBUILDS}
            for which, times in turns.items():
                both = [_timed(lab, build, self._context) for _ in range(times)]
                found[f"{which}, {builder}, s"] = median(took for took, _ in both)
                found[f"{which}, {builder}, processor s"] = mean(spent for _, spent in both)
            lab.engine.raw("DELETE", "/images/twenty:1?force=1")
            lab.engine.post("/build/prune?all=1")
        return found


def _dockerfile(number: int) -> str:
    steps = (
        "FROM busybox:1",
        f"ENV NUMBER={number}-{time.time_ns()}",
        "ARG MODE=release",
        "ENV MODE=$MODE APP=/app",
        'LABEL org.example.mode="$MODE"',
        "WORKDIR $APP",
        "COPY requirements.txt ./",
        "RUN mkdir /deps && sort requirements.txt > /deps/list",
        "RUN sha256sum /deps/list > /deps/sum",
        "COPY settings.ini /etc/app/",
        "RUN sed -i s/package/setting/ /etc/app/settings.ini",
        "COPY src ./src",
        "RUN find src -type f -exec cat {} + | sha256sum > built",
        "RUN mkdir -p /data/cache /data/log",
        "RUN chmod 640 built && chown -R nobody /app /data",
        "VOLUME /data",
        "USER nobody",
        "WORKDIR /data",
        "EXPOSE 8080",
        'CMD ["cat", "/app/built"]',
    )
    assert len(steps) == STEPS
    return "\n".join(steps) + "\n"


def _timed(lab: SkepLab, build: Callable[[SkepLab, Path], object], context: Path) -> tuple[float, float]:
    """Return the seconds and the processor seconds of a build.  It starts when no write is pending."""
    os.sync()
    spent, began = group_processor_s(lab.cgroup), time.monotonic()
    build(lab, context)
    took = time.monotonic() - began
    return took, group_processor_s(lab.cgroup) - spent


def _build_classically(lab: SkepLab, context: Path) -> None:
    """Build with the classic builder.  Raises: SystemExit: it failed."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(context, ".")
    query = urlencode({"t": "twenty:1", "rm": 1})
    said = lab.engine.raw("POST", f"/build?{query}", packed.getvalue(), "application/x-tar")
    if b'"error"' in said:
        raise SystemExit(f"{lab.system}: {said[-500:].decode(errors='replace')}")


def _build_by_buildkit(lab: SkepLab, context: Path) -> None:
    """Build with docker's plugin for BuildKit.  Raises: SystemExit: it failed."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(context.parent),
        "DOCKER_HOST": f"unix://{lab.engine.path}",
    }
    words = [str(_BUILDX), "build", "--progress", "quiet", "-t", "twenty:1", str(context)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{lab.system}: docker-buildx build: {done.stderr}")


if __name__ == "__main__":
    run_against(__doc__, "rebuilds", _measure)
