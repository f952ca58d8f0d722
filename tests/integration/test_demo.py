"""`make demo` and `make demo-down`, as a newcomer types them."""

import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from skep.aio.trees import discard_tree_now
from skep.playground.demo import free_port
from tests.support.machines.footprint import inhabitants, machine, survivors
from tests.support.machines.playground_rig import SKEP, TestCluster, wait_running, wait_until

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
NAME = f"demo{os.getpid()}"
"""What the demo's playground is called here: one that the machine's user looks at is left alone."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for the demo; what the test leaves in it is removed."""
    directory = Path(tempfile.mkdtemp(prefix="skep-test-", dir="/var/tmp"))
    try:
        yield directory / "demo"
    finally:
        make("demo-down", directory / "demo", check=False)
        discard_tree_now(directory)


def is_free(port: int) -> bool:
    """Whether nothing listens on the port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def make(target: str, directory: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run make in the checkout, without a terminal."""
    command = ["make", "--no-print-directory", target, f"DEMO_DIR={directory}", f"DEMO_NAME={NAME}"]
    environment = {key: value for key, value in os.environ.items() if key != "DOCKER_HOST"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr + done.stdout
    return done


def test_the_demo_shows_a_service_names_the_next_commands_and_goes_without_a_trace(place: Path) -> None:
    before = machine(NAME, place.parent)
    port = free_port(is_free)
    shown = make("demo", place).stdout
    assert "converged" in shown
    (url,) = re.findall(r"http://127\.0\.0\.1:\d+", shown)
    assert url == f"http://127.0.0.1:{port}"
    assert "responds: nginx in container " in shown
    commands = re.findall(r"^  ((?:docker|skep) [^#]+?) +#", shown, re.MULTILINE)
    assert [command.split()[:2] for command in commands] == [
        ["docker", "service"],
        ["docker", "kill"],
        ["docker", "service"],
        ["skep", "explain"],
        ["skep", "top"],
        ["skep", "ui"],
    ]
    assert f"export DOCKER_HOST=unix://{place}/m1/skep.sock" in shown
    environment = {**os.environ, "DOCKER_HOST": f"unix://{place}/m1/skep.sock"}
    explained = subprocess.run(
        [SKEP, *commands[3].split()[1:]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert explained.stdout == "web: 3 of 3 tasks run: healthy\n"
    assert_the_dashboard_opens(environment)

    node = TestCluster(place, NAME).node("m1")
    published = node.client().services.get("web").attrs["Endpoint"]["Ports"]
    assert [(one.get("PublishedPort"), one["PublishMode"]) for one in published] == [
        (port, "ingress"),
        (None, "host"),
    ]
    image = next(image for image in node.client().images.list("demo/nginx"))
    assert image.attrs["Size"] < 30_000_000

    node.docker("service", "scale", "--detach", "web=9")
    wait_running(node, "web", 9)
    victim = node.docker("ps", "--quiet").stdout.split()[0]
    node.docker("kill", victim)
    wait_until(lambda: victim not in node.docker("ps", "--quiet").stdout, "the container is gone")
    wait_running(node, "web", 9)
    assert "GET / " in node.docker("service", "logs", "web").stdout
    with urlopen(url, timeout=10) as response:
        assert response.read().startswith(b"nginx in container ")

    living = inhabitants(NAME)
    make("demo-down", place)
    left = survivors(living)
    assert sorted(left.processes) == []
    assert sorted(left.namespaces) == []
    assert machine(NAME, place.parent).more_than(before) == {}


def assert_the_dashboard_opens(environment: dict[str, str]) -> None:
    command = [SKEP, "ui", "--no-browser"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        try:
            with urlopen(served.stdout.readline().strip(), timeout=20) as page:
                assert b"<title>Skep" in page.read()
        finally:
            served.terminate()


@pytest.mark.slow
def test_the_demo_can_be_asked_for_twice(place: Path) -> None:
    make("demo", place)
    again = make("demo", place).stdout
    assert "Try these commands" in again
    assert "Start a cluster" not in again
