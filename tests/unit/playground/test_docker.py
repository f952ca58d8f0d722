"""How a docker node's engine is started."""

from pathlib import Path

import pytest

from skep.playground import docker, names
from skep.playground.description import PlaygroundNode
from skep.playground.node import described


def a_docker_node(directory: Path) -> PlaygroundNode:
    return described(directory, "demo", "d1", "worker", "192.168.100.13", "docker")


def test_docker_nodes_have_names_of_their_own() -> None:
    assert names.free_name("worker", ["w1", "d1"], "docker") == "d2"
    assert names.free_name("worker", ["w1", "d1"]) == "w2"


@pytest.fixture(autouse=True)
def dockerd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of that name: none of these tests starts it, and not every machine has one."""
    place = tmp_path / "bin/dockerd"
    place.parent.mkdir()
    place.touch(0o755)
    monkeypatch.setenv("PATH", str(place.parent))


def test_an_engine_keeps_its_data_on_the_nodes_disk_and_its_containers_in_the_nodes_cgroup(
    tmp_path: Path,
) -> None:
    made = a_docker_node(tmp_path)
    home = tmp_path / "d1"
    home.mkdir()
    words = docker.command(home, made)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--data-root"] == str(home / "data")
    assert options["--cgroup-parent"] == "/skep-playground/demo-d1/ctr"
    assert options["--host"] == made.endpoint == f"unix://{home}/docker.sock"
    assert (home / "daemon.json").read_text() == "{}\n"


def test_an_existing_configuration_stays(tmp_path: Path) -> None:
    home = tmp_path / "d1"
    home.mkdir()
    (home / "daemon.json").write_text('{"debug": true}')
    docker.command(home, a_docker_node(tmp_path))
    assert (home / "daemon.json").read_text() == '{"debug": true}'
