"""How ``skep`` finds a node: docker's contexts, and ssh to another machine; and what it sets in a cluster."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncssh
import pytest

from tests.support.machines.playground_rig import CLIS, IMAGE, SKEP, TestNode, wait_until

pytestmark = pytest.mark.timeout(120)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("cli", CLIS)
def test_the_context_that_docker_uses_is_used(m1: TestNode, tmp_path: Path, cli: str) -> None:
    configuration = {"DOCKER_CONFIG": str(tmp_path)}
    made = run(cli, "context", "create", "hive", "--docker", f"host={m1.socket}", **configuration)
    assert made.returncode == 0, made.stderr
    run(cli, "context", "use", "hive", **configuration)
    status = run(SKEP, "status", **configuration)
    assert status.returncode == 0, status.stderr
    assert "m1" in status.stdout
    assert "busybox" in run(SKEP, "image", "ls", **configuration).stdout
    by_name = run(SKEP, "status", DOCKER_CONTEXT="hive", **configuration)
    assert by_name.returncode == 0
    missing = run(SKEP, "--context", "nowhere", "status", **configuration)
    assert (missing.returncode, missing.stderr) == (
        1,
        f'Error: context "nowhere" is not in {tmp_path}/contexts. List contexts with skep context ls.\n',
    )


def test_a_host_that_is_none_is_one_line(m1: TestNode) -> None:
    for host in ("tcp://x:99999", "nonsense://x"):
        done = run(SKEP, "status", DOCKER_HOST=host)
        assert done.returncode == 1
        assert done.stderr.startswith(f"Error: unable to parse docker host `{host}`")
        assert len(done.stderr.splitlines()) == 1


def test_a_node_that_does_not_answer_is_said_in_plain_words() -> None:
    done = run(SKEP, "--host", "unix:///nonexistent/skep.sock", "status")
    assert (done.returncode, done.stderr) == (
        1,
        (
            "Error: unix:///nonexistent/skep.sock does not answer: no such file or directory. "
            "Check that the node runs, or choose another one with --host.\n"
        ),
    )


class _Server(asyncssh.SSHServer):
    """An SSH server that gives holders of the right key access to the sockets of this machine."""

    def unix_connection_requested(self, dest_path: str) -> bool:
        return True


@asynccontextmanager
async def an_ssh_server(directory: Path) -> AsyncIterator[int]:
    """A server on loopback, and in ``directory`` an ``ssh`` whose user is known there; gives the port."""
    host_key, user_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    (directory / "authorized").write_bytes(user_key.export_public_key())
    user_key.write_private_key(directory / "user")
    (directory / "user").chmod(0o600)
    server = await asyncssh.create_server(
        _Server,
        "127.0.0.1",
        0,
        server_host_keys=[host_key],
        authorized_client_keys=str(directory / "authorized"),
    )
    async with server:
        port = server.get_port()
        public = host_key.export_public_key().decode().strip()
        (directory / "known").write_text(f"[127.0.0.1]:{port} {public}\n")
        (directory / "config").write_text(
            f"UserKnownHostsFile {directory}/known\nIdentityFile {directory}/user\nIdentitiesOnly yes\n"
        )
        wrapper = directory / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {directory}/config "$@"\n')
        wrapper.chmod(0o755)
        yield port


@pytest.mark.needs("ssh")
async def test_a_node_on_another_machine_is_reached_by_ssh(m1: TestNode, tmp_path: Path) -> None:
    async with an_ssh_server(tmp_path) as port:

        async def skep(host: str, *words: str) -> tuple[int | None, str, str]:
            process = await asyncio.create_subprocess_exec(
                *(SKEP, "--host", host, *words),
                env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/nonexistent"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate()
            return process.returncode, out.decode(), err.decode()

        machine = f"ssh://me@127.0.0.1:{port}"
        socket = m1.socket.removeprefix("unix://")
        code, out, err = await skep(f"{machine}{socket}", "status")
        assert code == 0, err
        assert "m1" in out
        code, _, err = await skep(f"{machine}/nonexistent.sock", "status")
        assert code == 1
        assert err.startswith(f"Error: {machine}/nonexistent.sock does not answer")
        (tmp_path / "known").write_text("")
        code, _, err = await skep(f"{machine}{socket}", "status")
        assert (code, err) == (1, f"Error: {machine}{socket}: Host key verification failed.\n")
    assert not list(Path("/tmp").glob("skep-ssh-*")), "the forwarded sockets are gone"


def allowed(m1: TestNode, *rights: str) -> str:
    done = run(SKEP, "--host", m1.socket, "cluster", "allow", *rights)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def strict(m1: TestNode) -> Iterator[TestNode]:
    """A cluster that allows nothing, before and after."""
    assert allowed(m1) == "none"
    assert allowed(m1, "--format", "json") == '{"Allowed":[]}'
    yield m1
    m1.docker("service", "rm", "right", check=False)
    allowed(m1, "none")


def test_a_service_has_the_rights_that_the_cluster_allows_it(strict: TestNode) -> None:
    create = ["service", "create", "--detach", "--name", "right", "--restart-condition", "none"]
    create += [
        f"--container-label=skep.{one}"
        for one in ("shm-size=2m", "devices=/dev/kmsg:/dev/log0:r", "pid=host")
    ]
    script = "grep ' /dev/shm ' /proc/mounts; ls -l /proc/self/ns/pid; head -c 0 /dev/log0 && echo opened; sleep 1000"
    create += ["--cap-add", "SYSLOG", IMAGE, "sh", "-c", script]
    refused = strict.docker(*create, check=False)
    assert "this cluster does not allow services to use: devices,namespaces,resources" in refused.stderr
    assert allowed(strict, "devices", "namespaces", "resources") == "devices,namespaces,resources"
    strict.docker(*create)

    def logs() -> str:
        done = strict.docker("service", "logs", "--raw", "right", check=False)
        return done.stdout if "opened" in done.stdout else ""

    text = wait_until(logs, "the device is open", within_s=60)
    assert "size=2048k" in text
    assert os.readlink("/proc/self/ns/pid") in text
    refused = strict.docker(
        "service", "update", "--detach", "--container-label-add", "skep.privileged=true", "right", check=False
    )
    assert "this cluster does not allow services to use: privileged" in refused.stderr
    allowed(strict, "none")
    refused = strict.docker("service", "update", "--detach", "--force", "right", check=False)
    assert "this cluster does not allow services to use: devices,namespaces,resources" in refused.stderr


def test_a_service_whose_device_no_node_has_waits_and_says_so(strict: TestNode) -> None:
    allowed(strict, "devices")
    strict.docker(
        *("service", "create", "--detach", "--name", "right"),
        *("--container-label", "skep.devices=/dev/ttyNoSuch", IMAGE, "sleep", "1000"),
    )

    def reason() -> bool:
        found = strict.docker("service", "ps", "--no-trunc", "--format", "{{.Error}}", "right").stdout
        return "missing device on 1 node" in found

    wait_until(reason, "the reason is shown", within_s=60)
