"""Whose a process is, by its control groups, or by its mounts on a node without control groups."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.engine.confinement.cgroups import mount_namespace
from skep.model.values.ids import ContainerId
from skep.node.container_apis.peers import ConnectionPeer, container_in, peer_of

ONE, TWO = "1" * 64, "2" * 64


@pytest.mark.parametrize(
    ("groups", "container"),
    [
        ("0::/\n", None),
        ("0::/system.slice/skep.service\n", None),
        (f"0::/skep/ctr/{ONE}\n", ONE),
        (f"4:memory:/skep/ctr/{TWO}\n0::/\n", TWO),
        (f"0::/docker/{TWO}\n", None),  # a Docker Engine's
        (f"0::/mine/{ONE}\n", ONE),  # --cgroup-parent
        (f"0::/mine/{ONE}/{TWO}\n", ONE),
        (f"0::/skep/ctr/{TWO}/ctr/{ONE}\n", TWO),  # a container names groups below its own as it likes
        (f"0::/docker/{TWO}/{ONE}\n", ONE),
        (f"0::/mine/{ONE}0\n", None),
    ],
)
def test_the_first_group_of_a_container_says_whose_a_process_is(groups: str, container: str | None) -> None:
    assert container_in(groups, lambda one: one == ContainerId(ONE)) == container


@pytest.mark.parametrize(
    ("groups", "container"),
    [
        (f"0::/skep/ctr/{TWO}/agent\n", None),
        (f"0::/skep/ctr/{TWO}/nodes/w1/ctr/{ONE}\n", ONE),
        (f"0::/skep/ctr/{TWO}/nodes/w1/ctr/{ONE}/ctr/{TWO}\n", ONE),
    ],
)
def test_a_container_that_surrounds_the_node_is_its_machine(groups: str, container: str | None) -> None:
    assert container_in(groups, lambda _: False, {ContainerId(TWO)}) == container


CONNECTING = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[socket.socket]:
    """A connection from a process with mounts of its own."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        command = ["unshare", "--mount", sys.executable, "-c", CONNECTING, str(tmp_path / "s")]
        with subprocess.Popen(command):
            connected, _ = listener.accept()
            with connected:
                yield connected


@pytest.mark.needs("root", "unshare")
def test_without_control_groups_mounts_name_the_container(elsewhere: socket.socket) -> None:
    own = mount_namespace(os.getpid())
    asked: list[str] = []

    def with_mounts(mounts: str) -> ContainerId | None:
        asked.append(mounts)
        return ContainerId(ONE)

    assert peer_of(elsewhere, lambda _: False, with_mounts) == ONE
    assert asked != [own]


@pytest.mark.needs("root", "unshare")
def test_without_control_groups_a_process_with_unknown_mounts_is_refused(elsewhere: socket.socket) -> None:
    assert peer_of(elsewhere, lambda _: False, lambda _: None) is ConnectionPeer.GONE
    assert peer_of(elsewhere, lambda _: False) is ConnectionPeer.MACHINE, "with control groups, they decide"
