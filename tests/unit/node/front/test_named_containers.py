"""The front adds the place of a container to its own error, before a user below root gets it."""

import asyncio
import socket
from pathlib import Path

from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.errors import NotFound
from skep.model.permissions.access import Identity, Origin, parse_binding
from skep.node.front.application import Application
from skep.node.front.handover import Handover
from skep.node.front.server import DockerSocket, Front
from skep.node.front.users import KnownUsers
from tests.support.clients.front_rig import Member, Owned


class WithoutEngine(Owned):
    has_docker_engine = False


async def test_the_error_of_an_exec_has_the_place_of_the_container(tmp_path: Path) -> None:
    ann = Identity(name="ann", origin=Origin.TOKEN, bindings=(parse_binding("operator:shop"),))

    async def add_place(error: NotFound, target: str, identity: Identity) -> NotFound:
        assert (target, identity) == ("/v1.41/containers/theirs/exec", ann)
        return NotFound(f"{error} on this node")

    clock = SystemClock()
    socket_path = tmp_path / "handover.sock"
    front = Front(
        Application(None, add_place=add_place),  # type: ignore[arg-type]
        Handover(socket_path, clock, lambda: 0.5),
        ownership=WithoutEngine(),
        membership=Member(),
        docker=DockerSocket(None),
        users=KnownUsers(ApiClient.local(socket_path, "no manager"), clock, lambda: 0.5, None),
    )
    async with front.listening(()):
        ours, theirs = socket.socketpair()
        front.serve(theirs, ann)
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(b"POST /v1.41/containers/theirs/exec HTTP/1.1\r\nHost: n\r\nContent-Length: 0\r\n\r\n")
        async with asyncio.timeout(10):
            answer = (await reader.read()).decode()
        writer.close()
    assert answer.startswith("HTTP/1.1 404 ")
    assert "No such container: theirs on this node" in answer
