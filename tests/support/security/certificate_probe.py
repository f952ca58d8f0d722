"""Checks repeatedly whether managers accept a certificate.  Run it inside a node's network namespace.

    python -m tests.support.security.certificate_probe CERTIFICATES ADDRESS...

It writes the first response of each address to stderr, and ends when each address has refused ten more times after its
first refusal.  Then it prints, as JSON, the time of that refusal (``time.time``, one clock for the whole machine) and
the responses before it.  An address is ``ip:port`` for gRPC, ``peer:ip:port`` for etcd's peers.
"""

import asyncio
import json
import ssl
import sys
import time
from pathlib import Path
from typing import Any

from skep.errors import PermissionDenied, SkepError
from skep.security import keypair
from skep.security.keypair import KeyPair
from skep.security.tls import client_context
from skep.wire.client import open_channel, split_address
from tests.support.managers.wire_calls import call

AGAIN = 10
LONGEST_S = 60.0


async def main(certificates: str, *addresses: str) -> None:
    pair = keypair.load(Path(certificates))
    results = await asyncio.gather(
        *(watch(address, pair, is_alone=len(addresses) == 1) for address in addresses)
    )
    sys.stdout.write(json.dumps(dict(zip(addresses, results, strict=True))))


async def watch(address: str, pair: KeyPair, *, is_alone: bool) -> dict[str, Any]:
    """Send requests until the result is final.

    Return how often the certificate was accepted, the time and error of the first refusal, and how often
    it was accepted after that.
    If this is the only address, an error that the manager has no contact with the others counts as a refusal.
    """
    taken, refused_at, how, after = 0, None, "", []
    first = await ask(address, pair)
    print(f"{first} {address}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + LONGEST_S
    while len(after) < AGAIN and time.monotonic() < deadline:
        response = await ask(address, pair)
        if refused_at is not None:
            after.append(response)
        elif response == "taken":
            taken += 1
        elif response != "no contact" or is_alone:
            refused_at, how = time.time(), response
        await asyncio.sleep(0.05)
    return {"taken": taken, "refused_at": refused_at, "how": how, "retaken": after.count("taken")}


async def ask(address: str, pair: KeyPair) -> str:
    """Send a request.  Return ``taken``, or the class of the error."""
    if address.startswith("peer:"):
        return await ask_peer(address.removeprefix("peer:"), pair)
    name = "PINGS" if pair.identity.role.value == "manager" else "HEARTBEAT"
    try:
        async with open_channel(address, client_context(pair), "swarm-manager") as channel:
            error = await call(channel, name)
    except SkepError as unreachable:
        error = unreachable
    if isinstance(error, PermissionDenied):
        return f"PermissionDenied: {error}"
    return "no contact" if "lost contact with the others" in str(error) else "taken"


async def ask_peer(address: str, pair: KeyPair) -> str:
    """Send a request to etcd's peer port.  With TLS 1.3 a refusal comes after the handshake, as a lost connection."""
    host, port = split_address(address)
    context = client_context(pair)
    context.check_hostname = False
    context.set_alpn_protocols(["http/1.1"])
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.write(b"GET /version HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n")
            response = await reader.read(100)
            writer.close()
    except (OSError, ssl.SSLError, TimeoutError) as error:
        return type(error).__name__
    return "taken" if response.startswith(b"HTTP/1.1 200") else "closed"


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
