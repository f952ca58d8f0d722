"""Services of whole nodes under SELinux: what their tasks may read, and the proxies of the front door.

They need a kernel that enforces a policy, which ``SELINUX=1 make virtual`` boots.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SEARCHED
from tests.support.machines.lab import door_image
from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    containers,
    remove_stacks,
    wait_running,
    wait_until,
)
from tests.support.machines.stand_ins import load

_ENFORCE = Path("/sys/fs/selinux/enforce")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not _ENFORCE.exists() or _ENFORCE.read_text() != "1",
        reason="this kernel enforces no SELinux policy: docs/untested.md",
    ),
]

STACK = """\
version: "3.8"
x-task: &task
  image: busybox:1
  command: [sh, -c, "trap exit TERM; while :; do sleep 3600 & wait $$!; done"]
services:
  shared:
    <<: *task
    volumes: ["DIRECTORY/shared:/x:z", "data:/v"]
    secrets: [{source: hidden, target: hidden, mode: 0444}]
    configs: [{source: shown, target: /shown}]
  private:
    <<: *task
    volumes: ["DIRECTORY/private:/x:Z", "data:/v"]
  neither:
    <<: *task
    volumes: ["DIRECTORY/shared:/x", "DIRECTORY/private:/y", "DIRECTORY/machine:/z"]
volumes: {data: {}}
secrets: {hidden: {file: ./hidden}}
configs: {shown: {file: ./shown}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("selinux", configured={"m1": "selinux-enabled = true\n"}, managers=1) as playground:
        yield playground


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    remove_stacks(node)


def in_task(node: TestNode, service: str, command: str) -> str:
    """Return what a command prints in the service's container, errors included."""
    (one,) = containers(node, service)
    return node.docker("exec", one["Id"], "sh", "-c", f"{command} 2>&1", check=False).stdout


def test_a_stacks_directories_secrets_and_configs_are_read_as_its_file_says(
    m1: TestNode, tmp_path: Path
) -> None:
    assert "name=selinux" in m1.docker("info", "--format", "{{.SecurityOptions}}").stdout
    for name in ("shared", "private", "machine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"{name}\n")
    (tmp_path / "hidden").write_text("hidden\n")
    (tmp_path / "shown").write_text("shown\n")
    (tmp_path / "s.yml").write_text(STACK.replace("DIRECTORY", str(tmp_path)))
    words = [SKEP, "--host", m1.socket, "stack", "deploy", "--detach", "-c", str(tmp_path / "s.yml"), "s"]
    subprocess.run(words, check=True, timeout=120)
    for name in ("shared", "private", "neither"):
        wait_running(m1, f"s_{name}", 1, 120)
    read = "cat /x/file /run/secrets/hidden /shown; echo kept >/v/file; cat /v/file"
    assert in_task(m1, "s_shared", read) == "shared\nhidden\nshown\nkept\n"
    assert in_task(m1, "s_private", "cat /x/file /v/file") == "private\nkept\n"
    seen = in_task(m1, "s_neither", "cat /x/file /y/file /z/file")
    assert seen.startswith("shared\n")
    assert seen.count("Permission denied") == 2
    labels = {
        json.loads(m1.docker("inspect", containers(m1, f"s_{name}")[0]["Id"]).stdout)[0]["ProcessLabel"]
        for name in ("shared", "private", "neither")
    }
    assert len(labels) == 3
    assert all(label.startswith("system_u:system_r:container_t:s0:c") for label in labels)


def test_the_front_doors_proxies_serve_a_service(m1: TestNode, tmp_path: Path) -> None:
    """The node writes the proxy's files, and commands it over its socket."""
    program = shutil.which("haproxy", path=SEARCHED)
    load(m1, tmp_path, door_image(program or ""))
    subprocess.run([SKEP, "--host", m1.socket, "door", "up", "--image", "skep-door"], check=True, timeout=120)
    serve = "mkdir /w; echo page >/w/index.html; exec httpd -f -p 80 -h /w"
    words = ("--detach", "--name", "web", "--label", "skep.http=web.example.com", IMAGE, "sh", "-c", serve)
    m1.docker("service", "create", *words)
    wait_running(m1, "web", 1, 120)
    command = ["nsenter", f"--net={m1.description['netns']}", "curl", "-s", "-m", "5"]
    command += ["-H", "Host: web.example.com", "http://127.0.0.1/"]

    def page() -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout

    wait_until(lambda: page() == "page\n", "the proxy serves the page", 120)
    (proxy,) = containers(m1, "skep-door")
    shown = json.loads(m1.docker("inspect", proxy["Id"]).stdout)[0]
    assert shown["ProcessLabel"].startswith("system_u:system_r:container_t:s0:c"), "it is confined"
