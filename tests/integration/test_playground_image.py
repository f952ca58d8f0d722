"""The playground's image on a node of Skep: built by ``make image``, run, asked, stopped."""

import os
import re
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.integration.networks.lab import in_place, outside
from tests.support.machines.playground_rig import TestCluster, TestNode, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.needs("root", "debootstrap"),
]

ROOT = Path(__file__).parents[2]
IMAGE = "skep-playground"


def response_of(address: str) -> str:
    try:
        with urlopen(f"http://{address}:8080", timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def test_the_image_shows_a_cluster_in_one_privileged_container(
    own_cluster: TestCluster, own_m1: TestNode
) -> None:
    environment = {**os.environ, "DOCKER_HOST": own_m1.socket}
    subprocess.run(["make", "image"], cwd=ROOT, env=environment, timeout=900, check=True)

    refused = own_m1.docker("run", "--rm", IMAGE, check=False)
    assert refused.returncode == 1
    assert "docker run --privileged" in refused.stderr

    began = time.monotonic()
    container = own_m1.docker("run", "-d", "--privileged", "-p", "8080:8080", IMAGE).stdout.strip()
    address = own_m1.description["addr"]
    said = wait_until(
        lambda: in_place(outside(own_cluster), response_of, address), "the service answers", 120
    )
    print(f"answered after {time.monotonic() - began:.1f} s")
    assert re.fullmatch(r"nginx in container \w+\n", said)
    nodes = own_m1.docker("exec", container, "docker", "node", "ls", "--format", "{{.Hostname}} {{.Status}}")
    assert nodes.stdout.splitlines() == ["m1 Ready", "w1 Ready", "w2 Ready"]
    explained = own_m1.docker("exec", container, "skep", "explain", "web")
    assert explained.stdout == "web: 3 of 3 tasks run: healthy\n"

    own_m1.docker("restart", "-t", "50", container)
    wait_until(
        lambda: in_place(outside(own_cluster), response_of, address), "it answers after a restart", 120
    )

    own_m1.docker("stop", "-t", "50", container)
    assert own_m1.client().containers.get(container).attrs["State"]["ExitCode"] == 0
    own_m1.docker("rm", "--volumes", container)
