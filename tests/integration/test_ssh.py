"""A real sshd between a client and a node: ``DOCKER_HOST=ssh://``, and a socket that ``ssh -L`` forwards."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import docker
import pytest

from tests.conftest import SEARCHED
from tests.support.clients.ssh_client import a_forwarded_socket, write_client
from tests.support.machines.playground_rig import CLIS, SKEP, TestNode, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.needs("ssh", "sshd"), pytest.mark.timeout(180)]


class Machine(NamedTuple):
    """``address``: ``root@127.0.0.1:PORT``; ``environment``: of a client elsewhere, whose ``ssh`` knows it."""

    address: str
    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment | more, capture_output=True, text=True, timeout=60, check=False
        )


@contextmanager
def a_machine(folder: Path, node: TestNode) -> Iterator[Machine]:
    """An sshd on loopback, where ``docker`` reaches ``node``.

    It runs in a mount namespace of its own: it wants a user ``sshd``, and /run/sshd, which only its package makes.
    """
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=30
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = write_client(folder, f"[127.0.0.1]:{port}", (folder / "host.pub").read_text())
    # What the docker command asks for at the other end: a connection to the engine there, on stdin and stdout.
    (folder / "there").mkdir()
    (folder / "there/docker").write_text(f'#!/bin/sh\nexec {CLIS[-1]} --host {node.socket} "$@"\n')
    (folder / "there/docker").chmod(0o755)
    passwd = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("sshd:")]
    (folder / "passwd").write_text(
        "\n".join([*passwd, "sshd:x:65534:65534::/run/sshd:/usr/sbin/nologin", ""])
    )
    (folder / "server").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        f"SetEnv PATH={folder}/there:{os.environ['PATH']}\n"
    )
    sshd = shutil.which("sshd", path=SEARCHED) or "sshd"
    inside = f"mount --bind {folder}/passwd /etc/passwd && mkdir -p /run/sshd && exec {sshd} -D -e -f {folder}/server"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["unshare", "--mount", "sh", "-c", inside], stdout=log, stderr=log)
    try:
        wait_until(lambda: "Server listening" in (folder / "log").read_text(), "sshd listens")
        yield Machine(f"root@127.0.0.1:{port}", folder, environment)
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def machine(m1: TestNode, tmp_path: Path) -> Iterator[Machine]:
    with a_machine(tmp_path, m1) as machine:
        yield machine


@pytest.mark.parametrize("cli", CLIS)
def test_the_docker_command_works_over_ssh(machine: Machine, cli: str) -> None:
    shown = machine.run(
        cli, "node", "ls", "--format", "{{.Hostname}} {{.Status}}", DOCKER_HOST=f"ssh://{machine.address}"
    )
    assert (shown.returncode, shown.stdout) == (0, "m1 Ready\n"), shown.stderr
    run = machine.run(
        cli, "run", "--rm", "busybox:1", "echo", "there", DOCKER_HOST=f"ssh://{machine.address}"
    )
    assert (run.returncode, run.stdout) == (0, "there\n"), run.stderr


def test_a_socket_that_ssh_forwards_is_the_node(machine: Machine, m1: TestNode) -> None:
    user, _, port = machine.address.rpartition(":")
    where = (m1.socket.removeprefix("unix://"), "-p", port, user)
    with a_forwarded_socket(machine.folder, *where, environment=machine.environment) as forwarded:
        client = docker.DockerClient(forwarded)
        assert [node.attrs["Description"]["Hostname"] for node in client.nodes.list()] == ["m1"]
        output = client.containers.run("busybox:1", ["cat", "/etc/hostname"], hostname="far", remove=True)
        assert output == b"far\n"
        client.close()
        status = machine.run(SKEP, "--host", forwarded, "status")
        assert status.returncode == 0, status.stderr
        assert "m1" in status.stdout


def test_skep_reaches_the_node_through_the_same_sshd(machine: Machine, m1: TestNode) -> None:
    path = m1.socket.removeprefix("unix://")
    done = machine.run(SKEP, "--host", f"ssh://{machine.address}{path}", "status")
    assert done.returncode == 0, done.stderr
    assert "m1" in done.stdout
