"""Certificates of the front door: who gets which, and that a renewal loses no request."""

import asyncio
import os
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509

from skep.manager.acme.door_files import DoorFiles
from skep.manager.acme.writing import ask_for_renewal
from skep.model.door.payloads import DoorPayload
from skep.security.authority import Authority
from skep.store.interface import Store
from skep.store.kinds import Payload
from tests.support.networks.door_rig import DoorRig, a_door
from tests.support.security.acme_rig import CLOCK, a_rig
from tests.support.security.external_ca import server_certificate

pytestmark = pytest.mark.needs("haproxy", "root")

ONE = "127.0.0.2"
ROOT = Authority.create(name="sites")
ROOTS = ROOT.root_pem.decode()


def certificate(host: str, issued_ns: int = 1) -> DoorPayload:
    chain, key = server_certificate(ROOT, host)
    return DoorPayload(certificates={host: f"{chain.decode()}{key.decode()}"}, issued_ns=issued_ns)


def leaf_of(payload: DoorPayload) -> x509.Certificate:
    [pem] = payload.certificates.values()
    return x509.load_pem_x509_certificate(pem.encode())


@asynccontextmanager
async def a_site(directory: Path) -> AsyncIterator[DoorRig]:
    """Run a front door with the hosts ``a.example`` and ``b.example``."""
    volume = directory / "volume"
    volume.mkdir()
    async with a_door(volume) as rig, rig.tasks(ONE):
        rig.service("web", {"skep.http": "a.example,b.example"})
        rig.service("plain", {"skep.http": "a.example/plain", "skep.http.tls": "off"})
        rig.task("t1", "web", ONE)
        rig.task("t2", "plain", ONE)
        await rig.apply()
        yield rig


async def connected(
    rig: DoorRig, name: str | None, roots: str = ROOTS
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect with TLS as a client that trusts the authority.  Raises: ssl.SSLError."""
    context = ssl.create_default_context(cadata=roots)
    context.check_hostname = name is not None
    return await asyncio.open_connection("127.0.0.1", rig.tls_port, ssl=context, server_hostname=name or "")


async def served(rig: DoorRig, name: str, roots: str = ROOTS) -> x509.Certificate:
    """Return the certificate that a client gets."""
    _, writer = await connected(rig, name, roots)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(found)


@asynccontextmanager
async def requests(rig: DoorRig, name: str, roots: str = ROOTS) -> AsyncIterator[list[str]]:
    """Send requests during the block, on new and on kept connections.  Yields what failed."""
    failed, count, ends = list[str](), 0, asyncio.Event()

    async def ask(*, is_kept: bool) -> None:
        nonlocal count
        while not ends.is_set():
            reader, writer = await connected(rig, name, roots)
            for _ in range(20 if is_kept else 1):
                writer.write(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                await reader.readexactly(int(length[1]) if length is not None else 0)
                if " 200 " not in head:
                    failed.append(head)
                count += 1
            writer.close()

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(ask(is_kept=number % 2 == 0))
        try:
            yield failed
        finally:
            ends.set()
    assert count > 50


async def test_a_host_with_a_certificate_has_tls_and_others_have_not(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        sent = certificate("a.example")
        await rig.send(sent)
        assert await served(rig, "a.example") == leaf_of(sent)
        status, _, headers = await rig.ask("a.example/x?y=1")
        assert (status, headers["Location"]) == (308, "https://a.example/x?y=1")
        assert (await rig.ask("a.example/plain"))[0] == 200
        assert (await rig.ask("b.example/"))[0] == 200
        for name in ("b.example", "c.example", None):  # never the certificate of another site
            with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name|handshake.failure"):
                await connected(rig, name)


async def test_a_certificate_is_used_for_its_own_host_only(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        [pem] = certificate("b.example").certificates.values()
        await rig.send(DoorPayload(certificates={"a.example": pem}))
        with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name|handshake.failure"):
            await connected(rig, "b.example")


async def test_challenges_are_answered_at_once_and_before_a_redirect(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        await rig.send(certificate("a.example"))
        before = rig.reloads()
        await rig.send(certificate("a.example"), DoorPayload(challenges={"Token-1_": "Token-1_.Print"}))
        for host in ("a.example", "unknown.example"):
            status, text, _ = await rig.ask(f"{host}/.well-known/acme-challenge/Token-1_")
            assert (status, text) == (200, "Token-1_.Print")
        await rig.send(certificate("a.example"))
        assert (await rig.ask("a.example/.well-known/acme-challenge/Token-1_"))[0] == 308
        assert rig.reloads() == before


async def test_a_renewal_needs_no_reload_and_loses_no_request(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        await rig.send(certificate("a.example"))
        before = rig.reloads()
        async with requests(rig, "a.example") as failed:
            for issued in range(2, 7):
                sent = certificate("a.example", issued)
                await rig.send(sent)
                assert await served(rig, "a.example") == leaf_of(sent)
        assert (failed, rig.reloads()) == ([], before)


async def test_a_restarted_node_finds_a_renewal_that_haproxy_has_not(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        await rig.send(certificate("a.example"))
        rig.restart_node()
        sent = certificate("a.example", 2)
        await rig.send(sent)
        assert await served(rig, "a.example") == leaf_of(sent)


async def test_a_damaged_certificate_does_not_keep_others_from_their_hosts(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        good, bad = certificate("a.example"), certificate("b.example")
        [pem] = bad.certificates.values()
        [other] = certificate("b.example").certificates.values()
        mixed = pem[: pem.index("-----BEGIN PRIVATE")] + other[other.index("-----BEGIN PRIVATE") :]
        await rig.send(good, DoorPayload(certificates={"b.example": mixed}))
        assert await served(rig, "a.example") == leaf_of(good)
        assert (await rig.ask("b.example/"))[0] == 200


async def test_keys_are_files_of_root_that_end_with_their_certificates(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        await rig.send(certificate("a.example"))
        directory = Path(rig.payloads.door_mount("proxy").source)
        assert sorted(os.listdir(directory)) == ["a.example.pem", "crt-list"]
        assert [(directory / name).stat().st_mode & 0o777 for name in os.listdir(directory)] == [0o600] * 2
        texts = [path.read_bytes() for path in rig.directory.rglob("*") if path.is_file()]
        assert not any(b"PRIVATE KEY" in text for text in texts)
        await rig.send()
        assert os.listdir(directory) == ["crt-list"]
        assert (await rig.ask("a.example/"))[0] == 200
        with pytest.raises(ConnectionError):
            await connected(rig, "a.example")


async def test_without_a_directory_for_keys_the_door_serves_http(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        rig.payloads.forget("proxy")  # a task from before the node knew certificates
        await rig.send(certificate("a.example"), DoorPayload(challenges={"Token": "Token.Print"}))
        assert (await rig.ask("a.example/"))[0] == 200
        assert (await rig.ask("a.example/.well-known/acme-challenge/Token"))[1] == "Token.Print"


@asynccontextmanager
async def sending(store: Store, rig: DoorRig) -> AsyncIterator[None]:
    """Send the files of the store's records to the node whenever they change, as a manager does."""
    files = DoorFiles()

    async def follow() -> None:
        async with store.watch(Payload) as watch:
            async for commit in watch:
                if any(files.on_event(event) for event in commit.events):
                    await rig.send_files(*files.present(store.view()).values())

    following = asyncio.create_task(follow())
    try:
        yield
        assert not following.done(), following
    finally:
        following.cancel()
        await asyncio.wait([following])


async def wait_served(
    rig: DoorRig, name: str, roots: str, former: x509.Certificate | None = None
) -> x509.Certificate:
    """Return the certificate that a client gets, once it has one that is not the ``former`` one."""
    async with asyncio.timeout(20):
        while True:
            with suppress(OSError):  # includes errors of TLS
                if (found := await served(rig, name, roots)) != former:
                    return found
            await asyncio.sleep(0.02)


@pytest.mark.skipif(shutil.which("pebble") is None, reason="pebble is not installed")
@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_pebble_validates_at_haproxy_which_then_has_the_certificate(tmp_path: Path) -> None:
    """The leader, the records, the assignments, the node's files and HAProxy are the real ones."""
    async with a_site(tmp_path) as door, a_rig(tmp_path, door.port) as acme:
        acme.wanted, acme.publish_s = ("a.example",), 0.5
        async with sending(acme.store, door), acme.leading():
            await acme.until(lambda: bool(acme.record("a.example").pem))
            roots = await acme.front.issuer()
            first = await wait_served(door, "a.example", roots)
            async with requests(door, "a.example", roots) as failed:
                await acme.store.update(ask_for_renewal, "a.example", CLOCK.now_ns())
                await wait_served(door, "a.example", roots, first)
            assert failed == []
    assert acme.record("a.example").failures == 0
