"""`skep up` on machines of a playground, reached by OpenSSH's client through a server that runs commands in them."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncssh
import pytest

from tests.support.clients.ssh_client import write_client
from tests.support.machines.playground_rig import SKEP, TestCluster, a_playground, nodes_by_name

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow, pytest.mark.needs("ssh")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """A manager, and two machines in no cluster."""
    with a_playground("sshup", managers=1) as made:
        made.skep("add", "worker", "w8")
        made.skep("add", "worker", "w9")
        yield made


class _Server(asyncssh.SSHServer):
    def unix_connection_requested(self, dest_path: str) -> bool:
        return True


@asynccontextmanager
async def an_ssh_server(cluster: TestCluster, directory: Path) -> AsyncIterator[tuple[int, dict[str, str]]]:
    """Users are nodes: their commands run inside of these.  Gives its port, and the environment of a client."""
    host_key, user_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    (directory / "authorized").write_bytes(user_key.export_public_key())
    user_key.write_private_key(directory / "user")
    (directory / "user").chmod(0o600)

    async def inside(process: asyncssh.SSHServerProcess[bytes]) -> None:
        node = process.get_extra_info("username")
        where = ("--dir", str(cluster.directory), "--name", cluster.name, node)
        run = await asyncio.create_subprocess_exec(
            *(SKEP, "playground", "exec", *where, "--", "sh", "-c", process.command or "true"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await run.communicate(await process.stdin.read())
        process.stdout.write(out)
        process.stderr.write(err)
        process.exit(run.returncode or 0)

    server = await asyncssh.create_server(
        _Server,
        "127.0.0.1",
        0,
        server_host_keys=[host_key],
        authorized_client_keys=str(directory / "authorized"),
        process_factory=inside,
        encoding=None,
    )
    async with server:
        port = server.get_port()
        public = host_key.export_public_key().decode()
        yield port, write_client(directory, f"[127.0.0.1]:{port}", public)


async def test_machines_are_looked_at_and_joined_and_the_same_command_again_adds_what_is_missing(
    cluster: TestCluster, tmp_path: Path
) -> None:
    async with an_ssh_server(cluster, tmp_path) as (port, environment):

        async def up(*words: str) -> tuple[int | None, str, str]:
            process = await asyncio.create_subprocess_exec(
                *(SKEP, "up", *words),
                env=os.environ | environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await asyncio.wait_for(process.communicate(), 150)
            return process.returncode, out.decode(), err.decode()

        def machine(name: str) -> str:
            socket = cluster.node(name).socket.removeprefix("unix://")
            return f"ssh://{name}@127.0.0.1:{port}{socket}"

        m1, w8, w9 = machine("m1"), machine("w8"), machine("w9")
        code, _, err = await up("--dry-run", m1, w8)
        assert code == 0, err
        assert f"{w8}: is suitable: " in err
        code, _, err = await up(m1, w8, w9.replace("w9@", "nobody@"))
        assert code == 1
        assert "nothing was changed" in err
        assert set(nodes_by_name(cluster.node("m1"))) == {"m1"}

        code, out, err = await up(m1, w8)
        assert code == 0, err
        assert f"{m1}: already in a cluster" in err
        assert f"{w8}: has joined as a worker" in err
        assert out.startswith("2 machines in the cluster. Next: skep --host ssh://m1@")
        code, _, err = await up("--managers", "2", m1, w9, w8)
        assert code == 0, err
        assert f"{w9}: has joined as a manager" in err
        assert f"{w8}: already in the cluster" in err
        nodes = nodes_by_name(cluster.node("m1"))
        roles = {name: node["Spec"]["Role"] for name, node in nodes.items()}
        assert roles == {"m1": "manager", "w8": "worker", "w9": "manager"}
