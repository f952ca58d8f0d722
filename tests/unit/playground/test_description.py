"""The description of a playground, as measuring tools read it."""

from pathlib import Path

import msgspec
import pytest

from skep.errors import NotFound
from skep.playground.description import PlaygroundDescription
from skep.playground.node import described

CLUSTER = PlaygroundDescription(name="bees").with_node(
    described(Path("/var/tmp/bees"), "bees", "m1", "manager", "192.168.100.11")
)


def test_it_has_what_measuring_tools_ask_for() -> None:
    written = msgspec.to_builtins(CLUSTER)
    assert written["system"] == "skep"
    [node] = written["nodes"]
    assert set(node) >= {
        *("name", "role", "endpoint", "addr", "pids", "netns", "cgroup", "state_dir", "link", "start")
    }
    assert node["endpoint"] == "unix:///var/tmp/bees/m1/skep.sock"
    assert node["netns"] == "/run/netns/skep-bees-m1"
    assert node["start"][-1] == "m1"


def test_a_node_takes_the_place_of_its_former_self() -> None:
    again = msgspec.structs.replace(CLUSTER.node("m1"), pids=(7,))
    assert CLUSTER.with_node(again).nodes == (again,)


def test_an_unknown_node_is_answered_with_the_known_ones() -> None:
    with pytest.raises(NotFound, match=r"no node w9\. Choose one of m1"):
        CLUSTER.node("w9")
