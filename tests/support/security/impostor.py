"""A manager's responses to a client that claims to be another node.  Run it inside a node's namespace.

    python -m tests.support.security.impostor CERTIFICATES MANAGER HOSTNAME NETWORK ATTACHMENT

It uses one node's files to open a session as a Docker Engine with that hostname and all labels that a network may
require.  It requests an attachment to the network, and releases the attachment of another node.  It prints the errors
as JSON, which are empty if the manager allowed it.
"""

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from skep.errors import SkepError
from skep.model.node import EngineDescription, NodeDescription
from skep.security import keypair
from skep.security.tls import MANAGER_NAME, client_context
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import open_channel
from skep.wire.convert.node import description_to_pb

WITHIN_S = 10.0


async def main(certificates: Path, manager: str, hostname: str, network: str, attachment: str) -> None:
    engine = EngineDescription(engine_version="20.10.24", labels={"zone": "inner"})
    said = description_to_pb(NodeDescription(hostname=hostname, engine=engine))
    place = pb.AttachNetworkRequest(
        config=pb.NetworkAttachmentConfig(target=network), container_id="of-an-impostor"
    )
    tls = client_context(keypair.load(certificates))
    async with (
        open_channel(manager, tls, MANAGER_NAME) as channel,
        channel.stream(methods.SESSION) as session,
    ):
        await session.send(pb.SessionRequest(description=said), end=True)
        assert await session.receive() is not None
        attach = channel.call(methods.ATTACH_NETWORK, place, timeout_s=WITHIN_S)
        detach = channel.call(
            methods.DETACH_NETWORK, pb.DetachNetworkRequest(attachment_id=attachment), timeout_s=WITHIN_S
        )
        responses = {"attach": await outcome(attach), "detach": await outcome(detach)}
    sys.stdout.write(json.dumps(responses))


async def outcome(call: Coroutine[Any, Any, object]) -> str:
    try:
        await call
    except SkepError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
