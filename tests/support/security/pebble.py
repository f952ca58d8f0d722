"""A real ACME authority for tests: Pebble on loopback, between a name server and a web server of the test."""

import asyncio
import json
import os
import ssl
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from skep.security.authority import Authority
from tests.support.engine.log_receivers import free_port
from tests.support.networks.upstream import knows, upstream
from tests.support.security.external_ca import server_certificate

FORWARDED = ("Content-Type", "Accept", "User-Agent")
RETURNED = ("Content-Type", "Replay-Nonce", "Location", "Link", "Retry-After")


class Front:
    """Passes requests on to Pebble, counts them, and lets a test replace responses."""

    def __init__(self, context: ssl.SSLContext, roots: str) -> None:
        self.roots = roots
        self.directory = ""
        self.pebble = self.management = ""
        self.counts: Counter[str] = Counter()
        """Number of requests by the first part of their path."""
        self.is_away = False
        self.spoil: Callable[[str], web.Response | None] = lambda kind: None
        """Returns the response to a request of this kind, or None to pass it on."""
        self.challenges: Callable[[], Mapping[str, str]] = dict
        """Key authorizations by token, which the web server of the test serves."""
        self._context = context
        self._session: aiohttp.ClientSession

    @asynccontextmanager
    async def serving(self, port: int) -> AsyncIterator[None]:
        trusted = ssl.create_default_context(cadata=self.roots)
        connector = aiohttp.TCPConnector(ssl=trusted)
        async with aiohttp.ClientSession(connector=connector) as self._session, AsyncExitStack() as stack:
            for where, handler, context in (
                (0, self._pass_on, self._context),
                (port, self._challenge, None),
            ):
                app = web.Application()
                app.router.add_route("*", "/{path:.*}", handler)
                runner = web.AppRunner(app, shutdown_timeout=0.1)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.TCPSite(runner, "127.0.0.1", where, ssl_context=context).start()
                if context is not None:
                    self.directory = f"https://127.0.0.1:{runner.addresses[0][1]}/dir"
            yield

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        kind = request.path.split("/")[1]
        self.counts[kind] += 1
        if self.is_away:
            assert request.transport is not None
            request.transport.abort()
        if (spoiled := self.spoil(kind)) is not None:
            return spoiled
        headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        headers["Host"] = request.headers["Host"]
        url = f"{self.pebble}{request.raw_path}"
        async with self._session.request(
            request.method, url, data=await request.read(), headers=headers
        ) as response:
            kept = [(name, value) for name, value in response.headers.items() if name in RETURNED]
            return web.Response(status=response.status, headers=CIMultiDict(kept), body=await response.read())

    async def _challenge(self, request: web.Request) -> web.StreamResponse:
        token = request.path.removeprefix("/.well-known/acme-challenge/")
        found = self.challenges().get(token)
        return web.Response(text=found) if found is not None else web.Response(status=404)

    async def issuer(self) -> str:
        """Return the root (PEM) of the certificates that Pebble issues."""
        async with self._session.get(f"{self.management}/roots/0") as response:
            return await response.text()

    async def wait_ready(self) -> None:
        """Wait until Pebble accepts connections."""
        while True:
            try:
                async with self._session.get(f"{self.pebble}/dir"):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


class PebbleAtSwitch(NamedTuple):
    """Pebble in a playground's network: its directory, and the files with the roots that its clients need."""

    directory: str
    own_roots: Path
    issuer: Path


@contextmanager
def pebble_in(namespace: Path, address: str, node: str, directory: Path) -> Iterator[PebbleAtSwitch]:
    """Run Pebble at ``address`` in a network namespace.  It finds all names at ``node`` and reads challenges there."""
    root = Authority.create(name="pebble")
    files = {name: directory / f"pebble.{name}" for name in ("roots", "crt", "key", "json", "issuer")}
    certificate, key = server_certificate(root, address)
    for name, data in (("roots", root.root_pem), ("crt", certificate), ("key", key)):
        files[name].write_bytes(data)
    settings = {
        "listenAddress": f"{address}:14000",
        "managementListenAddress": f"{address}:15000",
        "certificate": str(files["crt"]),
        "privateKey": str(files["key"]),
        "httpPort": 80,
        "tlsPort": 443,
    }
    files["json"].write_text(json.dumps({"pebble": settings}))
    enter = ["nsenter", f"--net={namespace}"]
    names = ["pebble-challtestsrv", "-defaultIPv4", node, "-defaultIPv6", "", "-dns01", "127.0.0.1:8053"]
    names += ["-http01", "", "-https01", "", "-tlsalpn01", "", "-management", "127.0.0.1:8055"]
    authority = ["pebble", "-config", str(files["json"]), "-dnsserver", "127.0.0.1:8053"]
    environment = {**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "5"}
    with ExitStack() as stack, (directory / "pebble.log").open("wb") as log:
        for command in (names, authority):
            process = subprocess.Popen([*enter, *command], env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        fetch = ["curl", "-sk", "--retry", "20", "--retry-connrefused", "--retry-delay", "1"]
        url = f"https://{address}:15000/roots/0"
        subprocess.run([*enter, *fetch, "-o", str(files["issuer"]), url], check=True, timeout=60)
        yield PebbleAtSwitch(f"https://{address}:14000/dir", files["roots"], files["issuer"])


@contextmanager
def a_zone(directory: Path) -> Iterator[tuple[str, Path]]:
    """Run a name server.  Yields its address, and a program that writes records into it (``acme-dns-hook``)."""
    port, management = free_port(), free_port()
    command = ["pebble-challtestsrv", "-defaultIPv6", "", "-dns01", f"127.0.0.1:{port}"]
    command += ["-http01", "", "-https01", "", "-tlsalpn01", "", "-management", f"127.0.0.1:{management}"]
    program = directory / "dns-hook"
    program.write_text(
        f"""#!/bin/sh
echo "$1 $2" >>{directory}/dns-hook.log
[ "$1" = set ] && action=set-txt || action=clear-txt
exec curl -sf --retry 20 --retry-connrefused --retry-delay 1 \\
  -d "{{\\"host\\": \\"$2.\\", \\"value\\": \\"$3\\"}}" http://127.0.0.1:{management}/$action
"""
    )
    program.chmod(0o755)
    with (directory / "zone.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"127.0.0.1:{port}", program
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def pebble(
    directory: Path, validated_at: int = 0, names_at: str = "", **options: str
) -> AsyncIterator[Front]:
    """Run Pebble.

    Args:
        validated_at: Port on loopback at which Pebble reads challenges.  By default, the web server of the test.
        names_at: Address and port of the name server.  By default, each name leads to loopback.
        options: Its environment (``PEBBLE_WFE_NONCEREJECT``).
    """
    root = Authority.create(name="pebble")
    certificate, key = server_certificate(root, "127.0.0.1")
    certificate_file, key_file = directory / "pebble.crt", directory / "pebble.key"
    certificate_file.write_bytes(certificate)
    key_file.write_bytes(key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate_file, key_file)
    port, management_port, http_port = free_port(), free_port(), free_port()
    configuration = {
        "listenAddress": f"127.0.0.1:{port}",
        "managementListenAddress": f"127.0.0.1:{management_port}",
        "certificate": str(certificate_file),
        "privateKey": str(key_file),
        "httpPort": validated_at or http_port,
        "tlsPort": free_port(),
        "ocspResponderURL": "",
        "externalAccountBindingRequired": False,
    }
    file = directory / "pebble.json"
    file.write_text(json.dumps({"pebble": configuration}))
    environment = {
        "PEBBLE_VA_NOSLEEP": "1",
        "PEBBLE_WFE_NONCEREJECT": "0",
        "PEBBLE_AUTHZREUSE": "0",
        **options,
    }
    front = Front(context, root.root_pem.decode())
    front.pebble = f"https://127.0.0.1:{port}"
    front.management = f"https://127.0.0.1:{management_port}"
    async with upstream(knows("127.0.0.1")) as names, front.serving(http_port):
        with (directory / "pebble.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                "pebble",
                "-config",
                str(file),
                "-dnsserver",
                names_at or f"{names.address}:{names.port}",
                "-strict",
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            async with asyncio.timeout(20):
                await front.wait_ready()
            front.counts.clear()
            yield front
        finally:
            process.kill()
            await process.wait()
