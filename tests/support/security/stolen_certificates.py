"""The responses of a manager's ports to a client with a node's files.  Run it inside a node's network namespace.

    python -m tests.support.security.stolen_certificates once CERTIFICATES ADDRESS...  accepting addresses, as JSON
    python -m tests.support.security.stolen_certificates hold CERTIFICATES ADDRESS     "open", and the time of the close

An address is ``ip:port`` for gRPC, ``peer:ip:port`` for etcd's peers.  Server certificates are not verified.
"""

import asyncio
import json
import ssl
import sys
import time
from pathlib import Path

from skep.rpc import frames
from skep.security.keypair import CERTIFICATE_FILE, KEY_FILE
from skep.wire.client import split_address

WITHIN_S = 5.0
PEER_REQUEST = b"GET /version HTTP/1.1\r\nHost: m\r\n\r\n"
MANAGER_REQUEST = frames.PREFACE + frames.settings({})


async def connect(directory: Path, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(directory / CERTIFICATE_FILE, directory / KEY_FILE)
    is_peer = address.startswith("peer:")
    context.set_alpn_protocols(["http/1.1" if is_peer else "h2"])
    host, port = split_address(address.removeprefix("peer:"))
    async with asyncio.timeout(WITHIN_S):
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
    writer.write(PEER_REQUEST if is_peer else MANAGER_REQUEST)
    return reader, writer


async def is_taken(directory: Path, address: str) -> bool:
    """Return whether there is any response.  With TLS 1.3 a certificate is refused after the handshake."""
    try:
        reader, writer = await connect(directory, address)
        async with asyncio.timeout(WITHIN_S):
            response = await reader.read(100)
        writer.close()
    except (OSError, ssl.SSLError, TimeoutError):
        return False
    return bool(response)


async def hold(directory: Path, address: str) -> None:
    reader, _ = await connect(directory, address)
    assert await reader.read(100)
    sys.stdout.write("open\n")
    sys.stdout.flush()
    try:
        while await reader.read(100_000):
            pass
    except (OSError, ssl.SSLError):
        pass
    sys.stdout.write(f"{time.time()}\n")


async def once(directory: Path, *addresses: str) -> None:
    responses = await asyncio.gather(*(is_taken(directory, address) for address in addresses))
    sys.stdout.write(json.dumps(dict(zip(addresses, responses, strict=True))))


if __name__ == "__main__":
    how, certificates, *rest = sys.argv[1:]
    asyncio.run({"once": once, "hold": hold}[how](Path(certificates), *rest))
