"""Measures work with images on Skep and on a Docker Engine: pulls, builds, starts of tasks and of fresh images.

One Docker Engine and one playground node, each in its own namespaces, in alternating pairs.  ``--parts`` selects some:

* *pull*: an image of 300 MB (six layers, 6,000 files, half of it compressible) from a registry on the node's own
  loopback, until it is unpacked and listed
* *build*: ten steps by the classic builder, then the same again from the cache, and BuildKit by the docker command
* *context*: 10,000 files with 1 GB in total are sent, stored and copied, by BuildKit and by the classic builder
* *start*: tasks of a service until they run, and their removal (``scenarios.start``)
* *fresh*: the first start of a container of the image that was just pulled, compared with later ones
* *spread*: ten nodes (image stores of one process, over mutual TLS) fetch an image of 300 MB from one node, all at
  once

Before each timed part, all written data is flushed to the disk, so that one system does not wait for writes of the
other.
"""

import asyncio
import io
import json
import os
import random
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from statistics import median
from urllib.parse import urlencode

from bench.docker_lab import DockerLab
from bench.figures import Figure, Sides, ratio, run_parts, side_by_side
from bench.scenarios import Metrics, clear, start
from bench.skep_lab import SkepLab
from skep.engine.images.reference import parse_reference
from skep.playground.images.busybox import busybox_archive
from tests.support.images.images_rig import APP, ImageCluster, an_image, give
from tests.support.images.registry_rig import registry_program
from tests.support.machines.playground_rig import CLIS

PORT = 5000
BIG = f"127.0.0.1:{PORT}/big"
LAYERS = 6
FILES = 1000
"""Number of files per layer."""
FILE_BYTES = 50_000
LATER_STARTS = 5
NODES = 10
TASKS = 20
CONTEXT_FILES = 10_000
CONTEXT_FILE_BYTES = 100_000
Lab = DockerLab | SkepLab


@contextmanager
def _labs() -> Iterator[tuple[Path, Sequence[Lab]]]:
    """Run both systems with the image busybox, and yield a directory for files and the systems."""
    archive = asyncio.run(busybox_archive())
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        place = Path(directory)
        labs = (DockerLab(place / "docker"), SkepLab(place / "skep", "benchbuilds"))
        for lab in labs:
            stack.callback(lab.down)
            lab.up(archive.data, archive.image_id)
            clear(lab)
        yield place, labs


def _pulls(pairs: int) -> list[Figure]:
    with _labs() as (place, labs), ExitStack() as stack:
        for lab in labs:
            stack.enter_context(_registry(lab, place))
        _push(labs[0])
        return _pull_figures(*side_by_side(labs, pairs, _pulled))


def _builds(pairs: int) -> list[Figure]:
    with _labs() as (place, labs):
        return _build_figures(*side_by_side(labs, pairs, _Builds(place).measure))


def _contexts(pairs: int) -> list[Figure]:
    with _labs() as (place, labs):
        return _context_figures(*side_by_side(labs, pairs, _LargeContext(place).measure))


def _starts(pairs: int) -> list[Figure]:
    with _labs() as (_, labs):
        return _start_figures(labs, pairs)


def _spread(_: int) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory:
        return asyncio.run(_spread_figures(Path(directory)))


@contextmanager
def _registry(lab: Lab, place: Path) -> Iterator[None]:
    """Run a registry on the loopback of a lab's node.  Both systems' registries have their files in one directory."""
    settings = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(place / "registry")}},
        "http": {"addr": f"127.0.0.1:{PORT}"},
    }
    (place / "registry.yml").write_text(json.dumps(settings))
    process = subprocess.Popen(
        ["nsenter", f"--net={lab.netns}", registry_program(), "serve", str(place / "registry.yml")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _push(lab: Lab) -> None:
    """Let the Docker Engine build, compress and push the image to the registry."""
    rng = random.Random(17)
    files = {"Dockerfile": b"FROM busybox:1\n" + b"".join(b"COPY %d /%d\n" % (n, n) for n in range(LAYERS))}
    for layer in range(LAYERS):
        for number in range(FILES):
            noise = rng.randbytes(FILE_BYTES // 2)
            files[f"{layer}/{number % 50}/{number}"] = noise + b"a line of text\n" * (FILE_BYTES // 30)
    _build(lab, f"{BIG}:1", _tar(files))
    _docker(lab, "push", f"{BIG}:1")
    _remove(lab, f"{BIG}:1")


def _tar(files: Mapping[str, bytes]) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return output.getvalue()


def _docker(lab: Lab, *words: str, **variables: str) -> None:
    """Run the docker command on a lab.  Raises: SystemExit: it failed."""
    environment = {"PATH": os.environ["PATH"], "DOCKER_HOST": f"unix://{lab.engine.path}", **variables}
    done = subprocess.run([CLIS[0], *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{lab.system}: docker {' '.join(words)}: {done.stderr}")


def _build(lab: Lab, tag: str, context: bytes) -> bytes:
    """Build with the classic builder, and return its output."""
    said = lab.engine.raw("POST", f"/build?{urlencode({'t': tag, 'rm': 1})}", context, "application/x-tar")
    return _checked(lab, said)


def _checked(lab: Lab, said: bytes) -> bytes:
    """Return ``said``, a stream of messages, if none of them is an error.  Raises: SystemExit."""
    if b'"error"' in said:
        raise SystemExit(f"{lab.system}: {said[-500:].decode(errors='replace')}")
    return said


def _remove(lab: Lab, tag: str) -> None:
    """Remove an image and the layers that no other image has."""
    lab.engine.raw("DELETE", f"/images/{tag}?force=1")
    lab.engine.post("/images/prune", filters={"dangling": ["true"]})


def _timed(action: Callable[[], object]) -> float:
    """Return the duration of ``action`` in seconds.  It starts when no write is pending."""
    os.sync()
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _pulled(lab: Lab) -> Metrics:
    """Pull the big image, then start a container of it for the first time and again."""

    def pull() -> None:
        _checked(lab, lab.engine.raw("POST", f"/images/create?{urlencode({'fromImage': BIG, 'tag': '1'})}"))
        lab.engine.get(f"/images/{BIG}:1/json")

    took = _timed(pull)
    first, *later = (_started(lab, f"{BIG}:1") for _ in range(1 + LATER_STARTS))
    _remove(lab, f"{BIG}:1")
    return {"pull": took, "first": first, "later": median(later)}


def _started(lab: Lab, image: str) -> float:
    """Return the seconds from the request for a container until it runs."""
    body = {"Image": image, "Cmd": ["sleep", "600"], "HostConfig": {"NetworkMode": "none"}}
    made: list[str] = []

    def begin() -> None:
        made.append(lab.engine.post("/containers/create", body)["Id"])
        lab.engine.post(f"/containers/{made[0]}/start")

    took = _timed(begin)
    lab.engine.raw("DELETE", f"/containers/{made[0]}?force=1")
    return took


def _pull_figures(sides: Mapping[str, Sides], busy: Sequence[float]) -> list[Figure]:
    size = LAYERS * FILES * FILE_BYTES // 1_000_000

    def first_beside_later(system: str) -> Sides:
        return {which: sides[which][system] for which in ("later", "first")}

    return [
        ratio(1, f"pull and unpack of {size} MB, s", sides["pull"], limit=1.0, busy=busy),
        ratio(
            5,
            "first start of a fresh image beside later ones, s",
            first_beside_later("skep"),
            limit=1.2,
            busy=busy,
        ),
        ratio(0, "the same of Docker's, s", first_beside_later("docker")),
        ratio(0, "later starts of a plain container, s", sides["later"]),
    ]


class _Builds:
    """Builds of ten steps whose content differs each time."""

    def __init__(self, place: Path) -> None:
        """``place`` is the directory for the docker command's build context."""
        self._directory = place / "context"
        self._numbers = count()

    def measure(self, lab: Lab) -> Metrics:
        """Return the seconds of both builders, for new steps and for the same steps again."""
        files = _context(next(self._numbers))
        context = _tar(files)
        first = _timed(lambda: _build(lab, "ten:1", context))
        said: list[bytes] = []
        second = _timed(lambda: said.append(_build(lab, "ten:1", context)))
        if said[0].count(b"Using cache") != 9:
            raise SystemExit(f"{lab.system}: not all is cached: {said[0].decode()}")
        _remove(lab, "ten:1")
        found = {"first": first, "second": second}
        for name, content in _context(next(self._numbers)).items():
            (self._directory / name).parent.mkdir(parents=True, exist_ok=True)
            (self._directory / name).write_bytes(content)
        for which in ("first", "second"):
            found[f"{which} by BuildKit"] = _timed(
                lambda: _docker(lab, "build", "-q", "-t", "ten:2", str(self._directory), DOCKER_BUILDKIT="1")
            )
        _remove(lab, "ten:2")
        lab.engine.post("/build/prune?all=1")
        return found


def _context(number: int) -> dict[str, bytes]:
    steps = (
        "FROM busybox:1",
        f"ENV NUMBER={number}-{time.time_ns()}",
        "WORKDIR /app",
        "COPY requirements.txt ./",
        "RUN mkdir /deps && sort requirements.txt > /deps/list",
        "COPY src ./src",
        "RUN find src -type f -exec cat {} + | sha256sum > built",
        "RUN chmod 640 built && chown -R nobody /app",
        "EXPOSE 8080",
        'CMD ["cat", "built"]',
    )
    rng = random.Random(10)
    return {
        "Dockerfile": "\n".join(steps).encode(),
        "requirements.txt": b"".join(b"package-%d\n" % rng.randrange(1000) for _ in range(100)),
        **{f"src/{n % 10}/{n}.py": rng.randbytes(2500).hex().encode() for n in range(200)},
    }


def _build_figures(sides: Mapping[str, Sides], busy: Sequence[float]) -> list[Figure]:
    again = {which: sides[which]["skep"] for which in ("first", "second")}
    return [
        ratio(2, "classic build of ten steps, s", sides["first"], limit=1.0, busy=busy),
        ratio(3, "the same again, all cached, s", sides["second"], limit=0.5, busy=busy),
        ratio(3, "cached beside the first time, Skep's own, s", again, limit=0.5),
        ratio(0, "BuildKit, ten steps, docker command, s", sides["first by BuildKit"]),
        ratio(0, "BuildKit, the same again, s", sides["second by BuildKit"]),
    ]


class _LargeContext:
    """A context whose directory gets a new name each time, so that no builder has it in its cache."""

    def __init__(self, place: Path) -> None:
        """``place`` is the directory for the files."""
        self._numbers = count()
        self._place = place
        self._directory = place / "large"
        rng = random.Random(40)
        for number in range(CONTEXT_FILES):
            path = self._directory / f"{number % 200}" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.randbytes(CONTEXT_FILE_BYTES))
        (self._directory / "Dockerfile").write_text("FROM busybox:1\nCOPY . /app\n")

    def measure(self, lab: Lab) -> Metrics:
        """Return the seconds of both builders, from the command until its image is listed."""
        found = {}
        for which, variable in (("BuildKit", "1"), ("classic", "0")):
            self._directory = self._directory.rename(self._place / f"large-{next(self._numbers)}")
            words = ("build", "-q", "-t", "large:1", str(self._directory))
            found[which] = _timed(partial(_docker, lab, *words, DOCKER_BUILDKIT=variable))
            _remove(lab, "large:1")
            lab.engine.post("/build/prune?all=1")
        return found


def _context_figures(sides: Mapping[str, Sides], busy: Sequence[float]) -> list[Figure]:
    size = CONTEXT_FILES * CONTEXT_FILE_BYTES // 1_000_000
    text = f"context of {CONTEXT_FILES} files, {size} MB"
    return [
        # A ratio of 1.25 is 0.8 of Docker's speed.
        ratio(7, f"{text}, by BuildKit, s", sides["BuildKit"], limit=1.25, busy=busy),
        ratio(7, f"{text}, by the classic builder, s", sides["classic"], limit=1.25, busy=busy),
    ]


def _start_figures(labs: Sequence[Lab], pairs: int) -> list[Figure]:
    found: list[Figure] = []
    for tasks in (1, TASKS):
        sides, busy = side_by_side(labs, pairs, start(tasks))
        for what, number, limit in (
            ("create {} to running", 4, 0.25),
            ("remove {} to containers gone", 4, 0.1),
        ):
            text = f"{what.format(tasks)}, s"
            found.append(ratio(number, f"tasks: {text}", sides[text], limit=limit, busy=busy))
    return found


async def _spread_figures(place: Path) -> list[Figure]:
    made = an_image(*[50_000_000] * LAYERS)
    async with ImageCluster(place).running() as cluster:
        source = cluster.manager
        await give(source, made, with_manifest=True)
        name = f"{parse_reference(APP).name}@sha256:{sha256(made.manifest).hexdigest()}"
        nodes = [await cluster.add() for _ in range(NODES)]
        await cluster.run_service(name, source, *nodes)
        began = time.monotonic()
        await asyncio.gather(*(node.images.pull(name) for node in nodes))
        took = time.monotonic() - began
        sent = tuple(float(source.served.copies(digest)) for digest in made.digests)
    text = f"{NODES} nodes fetch 300 MB that one has:"
    return [
        Figure(
            number=6,
            what=f"{text} how often that one sends a layer",
            unit="times",
            values=sent,
            quantile=1,
            limit=3,
        ),
        Figure(number=0, what=f"{text} until all have it", unit="s", values=(took,)),
    ]


if __name__ == "__main__":
    parts = {"pull": _pulls, "build": _builds, "context": _contexts, "start": _starts, "spread": _spread}
    run_parts(__doc__, "builds", parts)
