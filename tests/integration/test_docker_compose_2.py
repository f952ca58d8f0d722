"""Docker Compose 2 of today, unchanged, against a node of Skep without a Docker Engine: a project and its life."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients.compose import Compose
from tests.support.machines.playground_rig import TestNode, wait_until
from tests.support.machines.plugins import plugin

pytestmark = pytest.mark.timeout(300)

PROJECT = """\
name: shop
services:
  store:
    image: busybox:1
    command: ["sh", "-c", "echo serving; touch /data/ready; exec httpd -f -p 80 -h /data"]
    environment:
      GREETING: hello
    volumes: ["data:/data"]
    configs: [motd]
    secrets: [key]
    networks:
      back:
        aliases: [files]
    healthcheck:
      test: ["CMD", "test", "-e", "/data/ready"]
      interval: 0.2s
      timeout: 5s
      retries: 50
    stop_grace_period: 1s
  prepare:
    image: busybox:1
    command: ["true"]
  front:
    image: busybox:1
    command: ["sh", "-c", "wget -q -O /tmp/ready http://files/ready && echo fetched; exec httpd -f -p 80 -h /tmp"]
    depends_on:
      store: {condition: service_healthy}
      prepare: {condition: service_completed_successfully}
    networks: [back]
    ports: ["127.0.0.1::80"]
    restart: unless-stopped
    stop_grace_period: 1s
    init: true
    read_only: true
    tmpfs: [/tmp]
    ulimits: {nofile: 200}
    deploy: {resources: {limits: {memory: 64m, cpus: "0.5"}}}
networks:
  back: {}
volumes:
  data: {}
configs:
  motd: {content: "welcome"}
secrets:
  key: {file: ./key}
"""


class Compose2(Compose):
    """Version 2, from its signed package."""

    def __init__(self, node: TestNode, directory: Path) -> None:
        super().__init__(node, directory, [str(plugin("docker-compose")), "--progress", "plain"])

    def containers(self) -> dict[str, Any]:
        """By the name of the container."""
        lines = self("ps", "--all", "--format", "json").splitlines()
        return {one["Name"]: one for one in map(json.loads, lines)}


@pytest.fixture
def compose(m1: TestNode, tmp_path: Path) -> Iterator[Compose2]:
    (tmp_path / "compose.yaml").write_text(PROJECT)
    (tmp_path / "key").write_text("hunter2")
    compose = Compose2(m1, tmp_path)
    yield compose
    compose("down", "-v", "-t", "1", "--remove-orphans", check=False)


def test_a_project_comes_up_is_used_and_goes_down(m1: TestNode, compose: Compose2) -> None:
    compose("up", "-d", "--wait", "store", "front")

    found = compose.containers()
    states = {name: (one["State"], one["Health"], one["ExitCode"]) for name, one in found.items()}
    assert states == {
        "shop-store-1": ("running", "healthy", 0),
        "shop-prepare-1": ("exited", "", 0),
        "shop-front-1": ("running", "", 0),
    }
    wait_until(lambda: "fetched" in compose("logs", "front"), "the other service was reached by its alias")
    assert "serving" in compose("logs", "--tail", "10", "--no-log-prefix", "store")
    assert compose("exec", "-T", "store", "sh", "-c", "echo $GREETING") == "hello\n"
    assert compose("exec", "-T", "store", "cat", "/motd", "/run/secrets/key") == "welcomehunter2"
    assert "ulimit" not in compose("exec", "-T", "front", "sh", "-c", "ulimit -n")
    assert compose("port", "front", "80").startswith("127.0.0.1:")
    assert "httpd" in compose("top", "store")
    compose("cp", "store:/data/ready", str(compose.directory / "copied"))
    assert (compose.directory / "copied").exists()
    assert compose("run", "--rm", "-T", "--no-deps", "store", "echo", "once") == "once\n"

    compose("up", "-d", "--wait", "store", "front")
    assert {one["ID"] for one in compose.containers().values()} >= {
        found[name]["ID"] for name in ("shop-store-1", "shop-front-1")
    }, "nothing has changed, so nothing is made anew"
    (compose.directory / "compose.yaml").write_text(PROJECT.replace("hello", "good day"))
    compose("up", "-d", "-t", "1", "--scale", "front=2", "store", "front")
    assert compose("exec", "-T", "store", "sh", "-c", "echo $GREETING") == "good day\n"
    assert compose("exec", "-T", "store", "ls", "/data") == "ready\n", "its volume has stayed"
    assert "shop-front-2" in compose.containers()
    compose("pause", "store")
    assert compose.containers()["shop-store-1"]["State"] == "paused"
    compose("unpause", "store")
    compose("restart", "-t", "1", "store")
    compose("kill", "store")
    wait_until(lambda: compose.containers()["shop-store-1"]["ExitCode"] == 137, "the kill is shown")
    compose("stop", "-t", "1")
    assert {one["State"] for one in compose.containers().values()} == {"exited"}
    assert {one["Name"] for one in json.loads(compose("ls", "--all", "--format", "json"))} == {"shop"}
    assert "busybox" in compose("images")

    compose("down", "-v", "-t", "1")
    assert m1.docker("ps", "-aq", "--filter", "label=com.docker.compose.project=shop").stdout == ""
    assert m1.docker("network", "ls", "-q", "--filter", "name=shop").stdout == ""
    assert m1.docker("volume", "ls", "-q", "--filter", "name=shop").stdout == ""


def test_a_link_is_a_name_of_one_container(m1: TestNode, compose: Compose2) -> None:
    linked = "services:\n  a: {image: busybox:1, command: sleep 60}\n"
    linked += "  b: {image: busybox:1, command: sleep 60, links: ['a:other']}\n"
    (compose.directory / "compose.yaml").write_text(f"name: shop\n{linked}")
    compose("up", "-d")
    assert " 0% packet loss" in m1.docker("exec", "shop-b-1", "ping", "-c", "1", "-W", "2", "other").stdout
    assert m1.docker("exec", "shop-a-1", "nslookup", "other", check=False).returncode != 0
