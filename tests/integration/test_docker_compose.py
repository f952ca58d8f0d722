"""docker-compose 1, unchanged, against a node of Skep without a Docker Engine: a project of two plain containers."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients.compose import Compose
from tests.support.machines.playground_rig import TestNode, wait_until


def _is_version_1() -> bool:
    """Whether docker-compose is here, and the one whose output these tests read; Debian 13 has version 2."""
    if shutil.which("docker-compose") is None:
        return False
    shown = subprocess.run(
        ["docker-compose", "version", "--short"], capture_output=True, text=True, check=False
    )
    return shown.stdout.startswith("1.")


pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not _is_version_1(), reason="docker-compose 1 is not installed"),
]

PROJECT = """\
services:
  store:
    image: busybox:1
    command: ["sh", "-c", "echo serving; touch /data/ready; exec httpd -f -p 80 -h /data"]
    environment:
      GREETING: hello
    volumes:
      - data:/data
    networks:
      back:
        aliases: [files]
    healthcheck:
      test: ["CMD", "test", "-e", "/data/ready"]
      interval: 0.2s
      timeout: 5s
      retries: 50
    stop_grace_period: 1s
  front:
    image: busybox:1
    command: ["sh", "-c", "wget -q -O /tmp/ready http://files/ready && echo fetched; exec httpd -f -p 80 -h /tmp"]
    depends_on:
      store:
        condition: service_healthy
    networks: [back]
    ports: ["127.0.0.1:0:80"]
    restart: unless-stopped
    stop_grace_period: 1s
networks:
  back: {}
volumes:
  data: {}
"""


def ids(compose: Compose) -> set[str]:
    return set(compose("ps", "-q").split())


@pytest.fixture
def compose(m1: TestNode, tmp_path: Path) -> Iterator[Compose]:
    (tmp_path / "docker-compose.yml").write_text(PROJECT)
    compose = Compose(
        m1,
        tmp_path,
        ["docker-compose", "-p", "shop"],
        # Version 1 reads ContainerConfig of images, which Docker's API has no more since 1.45.
        {"COMPOSE_API_VERSION": "1.41"},
    )
    yield compose
    compose("down", "-v", "-t", "1", check=False)


def test_a_project_comes_up_is_used_and_goes_down(m1: TestNode, compose: Compose) -> None:
    compose("up", "-d")

    shown = compose("ps")
    assert "shop_store_1" in shown
    assert "Up (healthy)" in shown
    found = ids(compose)
    assert len(found) == 2
    wait_until(lambda: "fetched" in compose("logs", "front"), "the other service was reached by its alias")
    assert "serving" in compose("logs", "--tail", "10", "store")
    assert compose("exec", "-T", "store", "sh", "-c", "echo $GREETING") == "hello\n"
    assert compose.run("exec", "-T", "front", "sh", "-c", "exit 7", check=False).returncode == 7
    assert compose("exec", "-T", "front", "wget", "-q", "-O", "-", "http://store/ready") == ""
    assert compose("port", "front", "80").startswith("127.0.0.1:")

    compose("up", "-d")
    assert ids(compose) == found, "nothing has changed, so nothing is made anew"
    (compose.directory / "docker-compose.yml").write_text(PROJECT.replace("hello", "good day"))
    compose("up", "-d", "-t", "1")
    assert compose("exec", "-T", "store", "sh", "-c", "echo $GREETING") == "good day\n"
    assert compose("exec", "-T", "store", "ls", "/data") == "ready\n", "its volume has stayed"
    compose("restart", "-t", "1", "front")
    compose("stop", "-t", "1")
    assert "Exit" in compose("ps")
    compose("start")

    compose("down", "-v", "-t", "1")
    assert m1.docker("ps", "-aq", "--filter", "label=com.docker.compose.project=shop").stdout == ""
    assert m1.docker("network", "ls", "-q", "--filter", "name=shop").stdout == ""
    assert m1.docker("volume", "ls", "-q", "--filter", "name=shop").stdout == ""


@pytest.mark.slow
def test_a_project_is_scaled_paused_and_killed(compose: Compose) -> None:
    compose("up", "-d", "--scale", "front=2")
    assert len(ids(compose)) == 3
    assert "httpd" in compose("top", "store")
    compose("pause", "store")
    assert "Paused" in compose("ps")
    compose("unpause", "store")
    compose("kill", "store")
    wait_until(lambda: "Exit 137" in compose("ps"), "the end of the killed container is shown")
    compose("rm", "-f", "store")
    assert len(ids(compose)) == 2
