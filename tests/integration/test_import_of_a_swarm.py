"""``skep import swarm`` of a real Docker Swarm, and the stack file that it makes, read by Skep."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.machines.plain_engine import docker, plain_engine
from tests.support.machines.playground_rig import SKEP

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow, pytest.mark.needs("root", "dockerd")]

STACK = """\
version: "3.8"
services:
  web:
    image: registry.invalid/shop/web:1
    environment: {WORD: "a$$b"}
    configs: [{source: site, target: /etc/site}]
    secrets: [password]
    networks: [front]
    ports: ["8080:80"]
    deploy: {replicas: 2, placement: {constraints: [node.role == manager]}}
networks: {front: {driver_opts: {encrypted: ""}}}
configs: {site: {file: ./site}}
secrets: {password: {file: ./password}}
"""


def test_stacks_networks_and_names_of_secrets_are_taken_out_of_a_docker_swarm(tmp_path: Path) -> None:
    (tmp_path / "stack.yml").write_text(STACK)
    (tmp_path / "site").write_text("content of the site")
    (tmp_path / "password").write_text("hidden")
    with plain_engine() as socket:

        def done(*words: str) -> str:
            made = docker(socket, *words)
            assert made.returncode == 0, made.stderr
            return made.stdout.decode()

        done("swarm", "init", "--advertise-addr", "127.0.0.1")
        words = ("stack", "deploy", "--resolve-image", "never", "-c", str(tmp_path / "stack.yml"), "shop")
        done(*words)
        done(
            "service", "create", "--detach", "--no-resolve-image", "--name", "lonely", "registry.invalid/a:1"
        )
        imported = subprocess.run(
            [SKEP, "--host", f"unix://{socket}", "import", "swarm", "--output", "moved"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert imported.returncode == 0, imported.stderr
    moved = tmp_path / "moved"
    shop = yaml.safe_load((moved / "shop.yaml").read_text())
    web = shop["services"]["web"]
    assert web["image"] == "registry.invalid/shop/web:1"
    assert (web["deploy"]["replicas"], web["deploy"]["placement"]["constraints"]) == (
        2,
        ["node.role == manager"],
    )
    assert shop["networks"]["front"]["driver_opts"] == {"encrypted": ""}
    (config,) = (moved / "configs").iterdir()
    assert config.read_text() == "content of the site"
    page = (moved / "MOVING.md").read_text()
    assert "docker secret create --label com.docker.stack.namespace=shop shop_password FILE" in page
    assert "skep stack deploy --compose-file shop.yaml shop" in page
    assert "hidden" not in "".join(path.read_text() for path in moved.rglob("*") if path.is_file())
    for name in ("shop", "services"):
        words = ("stack", "config", "--quiet", "--compose-file", f"moved/{name}.yaml")
        read = subprocess.run([SKEP, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (read.returncode, read.stderr) == (0, "")
