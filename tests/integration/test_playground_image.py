"""The playground's image on a node of Skep and on a Docker Engine: built by ``make image``, run, asked, stopped."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import pytest

from tests.integration.networks.lab import in_place, outside
from tests.integration.side_by_side.real_engine import ADDRESS, real_engine
from tests.support.machines.playground_rig import CLIS, TestCluster, TestNode, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.needs("root", "debootstrap"),
]

ROOT = Path(__file__).parents[2]
IMAGE = "skep-playground"
ANSWERS_WITHIN_S = 20.0
"""Seconds from ``docker run`` to a response of the cluster's service."""


class Engine(NamedTuple):
    """What runs the image, and where its published ports are reached."""

    host: str
    netns: Path
    address: str

    def docker(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [CLIS[0], "--host", self.host, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    def response(self) -> str:
        return in_place(self.netns, _response_of, self.address)


def _response_of(address: str) -> str:
    try:
        with urlopen(f"http://{address}:8080", timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def _has_every_capability() -> bool:
    """Whether a Docker Engine can start privileged containers.  Skep gives them the capabilities that there are."""
    (bounding,) = re.findall(r"^CapBnd:\s+(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(bounding, 16) == (2 << int(Path("/proc/sys/kernel/cap_last_cap").read_text())) - 1


@pytest.fixture(params=["skep", "docker"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "docker":
        with real_engine() as (host, name):
            yield Engine(host, Path("/run/netns", name), ADDRESS)
    else:
        cluster: TestCluster = request.getfixturevalue("own_cluster")
        m1: TestNode = request.getfixturevalue("own_m1")
        yield Engine(m1.socket, outside(cluster), m1.description["addr"])


def test_the_image_shows_a_cluster_in_one_privileged_container(engine: Engine) -> None:
    subprocess.run(
        ["make", "image"], cwd=ROOT, env={**os.environ, "DOCKER_HOST": engine.host}, timeout=900, check=True
    )

    refused = engine.docker("run", "--rm", IMAGE, check=False)
    assert refused.returncode == 1
    assert "docker run --privileged" in refused.stderr
    if engine.address == ADDRESS and not _has_every_capability():
        pytest.skip("a Docker Engine starts privileged containers only on machines with every capability")

    began = time.monotonic()
    container = engine.docker("run", "-d", "--privileged", "-p", "8080:8080", IMAGE).stdout.strip()
    said = wait_until(engine.response, "the service answers", ANSWERS_WITHIN_S)
    print(f"answered after {time.monotonic() - began:.1f} s")
    assert re.fullmatch(r"nginx in container \w+\n", said)
    nodes = engine.docker("exec", container, "docker", "node", "ls", "--format", "{{.Hostname}} {{.Status}}")
    assert nodes.stdout.splitlines() == ["m1 Ready", "w1 Ready", "w2 Ready"]
    explained = engine.docker("exec", container, "skep", "explain", "web")
    assert explained.stdout == "web: 3 of 3 tasks run: healthy\n"

    engine.docker("restart", "-t", "50", container)
    wait_until(engine.response, "it answers after a restart", 120)

    engine.docker("stop", "-t", "50", container)
    ended = engine.docker("inspect", "--format", "{{.State.ExitCode}}", container)
    assert ended.stdout == "0\n"
    engine.docker("rm", "--volumes", container)
