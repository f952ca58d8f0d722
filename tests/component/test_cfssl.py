"""Certificates signed by the cfssl program itself, with mutual TLS, as Docker's documentation has it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from skep.agent.certificates import renew
from skep.security.authority import Authority
from skep.store.kinds import ROOT_KEY_ID, Payload
from tests.component.test_external_ca import CLOCK, join_worker, leader, named, rotated, rotating_to, update
from tests.support.managers.wire_rig import Cluster, a_worker, an_agent, pair_of
from tests.support.security.external_ca import ExternalAuthority, cfssl_command


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster(heartbeat_s=3).serving() as serving, serving.leading(), leader(serving.store):
        yield serving


@asynccontextmanager
async def cfssl(directory: Path, root: Authority, trusted: Sequence[Authority]) -> AsyncIterator[Any]:
    """``cfssl serve`` with this root, for callers with certificates of the roots ``trusted``."""
    port = await a_free_port()
    command = cfssl_command(directory, "127.0.0.1", port, root, trusted)
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(30):
            while not await listens(port):
                assert process.returncode is None, "cfssl ended"
                await asyncio.sleep(0.05)
        authority = ExternalAuthority(root)  # for its name only: cfssl responds
        authority.url = f"https://127.0.0.1:{port}/api/v1/cfssl/sign"
        yield authority
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def a_free_port() -> int:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def test_nodes_join_with_certificates_that_cfssl_signs(cluster, tmp_path):
    async with cfssl(tmp_path, cluster.authority, [cluster.authority]) as authority:
        await update(cluster, rotating_to(authority))  # the key is cfssl's alone
        assert cluster.view.lookup(Payload, ROOT_KEY_ID) is None
        pair = await join_worker(cluster)
        renewed = await renew(cluster.address, pair, CLOCK)
    for one in (pair, renewed):
        one.certificate.verify_directly_issued_by(cluster.authority.certificate)
    assert renewed.identity == pair.identity
    assert renewed.certificate.serial_number != pair.certificate.serial_number


async def test_a_rotation_to_cfssl_and_away_ends_with_new_certificates_everywhere(cluster, tmp_path):
    for name in ("w", "m", "ca"):
        (tmp_path / name).mkdir()
    theirs = Authority.create()
    pair = await a_worker(cluster, tmp_path / "w")
    async with (
        cluster.own_agent(tmp_path / "m"),
        an_agent(cluster, pair, tmp_path / "w") as (agent, _),
        cfssl(tmp_path / "ca", theirs, [theirs, cluster.authority]) as authority,
    ):
        await update(cluster, rotating_to(authority))
        await rotated(cluster)
        pair_of(agent).certificate.verify_directly_issued_by(theirs.certificate)
        # Away from it: cfssl signs the next root with its profile of authorities.
        await update(cluster, named(authority, force_rotate=1))
        await rotated(cluster)
        assert cluster.swarm.tls_info.trust_root != theirs.root_pem.decode()
